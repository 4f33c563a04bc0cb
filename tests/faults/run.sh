#!/usr/bin/env bash
# Faults of machines and files, against the program as it is installed; README.md says what each part does.
#
#   tests/faults/run.sh short|long [PROGRAM]
#
# FAULTS_WORK names the working folder (default: a temporary one). The long form can be stopped and called again with
# the same folder: what is in its results.txt is not repeated. FAULTS_KILLS is the number of kills of each command,
# FAULTS_COMMANDS the commands that are killed and run on a full disk, FAULTS_PARTS the tests to run.
set -uo pipefail

form=${1:-short}
program=$(realpath "${2:-target/release/difflora}")
repository=$(realpath "$(dirname "$0")/../..")
work=${FAULTS_WORK:-$(mktemp -d)}
case $form in
    short) kills=${FAULTS_KILLS:-1} many=2000 ;;
    long) kills=${FAULTS_KILLS:-1000} many=50000 ;;
    *) sed -n '2,9p' "$0"; exit 2 ;;
esac
mkdir -p "$work" && cd "$work" || exit 1
results=$work/results.txt
touch "$results"
export TMPDIR=$work HF_HUB_OFFLINE=1
unset "${!DIFFLORA_@}"

# Notes the outcome of one test; a failure also goes to stderr with the last lines of the program's.
note() { # NAME ok|FAILED [WHY]
    echo "$*" >>"$results"
    [[ $2 == ok ]] || { echo "$*" >&2; [[ -f stderr ]] && tail -5 stderr >&2; }
}
declare -A noted
while read -r name _; do noted[$name]=1; done <"$results"
done_before() { [[ -n ${noted[$1]:-} ]]; }

# The commands that write, each into $out alone, and what a second call adds to continue.
commands=(portraits gen convert resize mix perturb merge extract embed crop train-lora build-dataset train-lae train-dit
    train-encoder train-base)
[[ -z ${FAULTS_COMMANDS:-} ]] || read -ra commands <<<"$FAULTS_COMMANDS"
arguments() { # NAME OUT MORE…: fills line
    local name=$1 out=$2
    shift 2
    case $name in
        portraits) set -- portraits --people 2 --images 3 --out "$out" ;;
        gen) set -- gen --ref "$photo" --prompt a b --steps 2 --out "$out" --lora-out "$out/me.safetensors" ;;
        convert) set -- lora --base tiny convert "$lora" "$out/a.safetensors" --format peft ;;
        resize) set -- lora --base tiny resize "$lora" "$out/a.safetensors" --rank 2 ;;
        mix) set -- lora --base tiny mix --lora "$lora" "$lora" --out "$out/a.safetensors" ;;
        perturb) set -- lora --base tiny perturb "$lora" "$out/a.safetensors" ;;
        merge) set -- lora --base tiny merge --lora "$lora" --out "$out/model" ;;
        extract) set -- lora extract tiny "$model" --out "$out/a.safetensors" --rank 2 ;;
        embed) set -- face embed "$photos" --out "$out/a.safetensors" ;;
        crop) set -- face crop "$photos" --out "$out" ;;
        train-lora) set -- train-lora "$photos" --out "$out/a.safetensors" --steps 6 --checkpoint-every 2 "$@" ;;
        build-dataset) set -- build-dataset --config few.toml --out "$out" ;;
        train-lae) set -- train-lae --dataset "$dataset" --config hypernet.toml --out "$out" "$@" ;;
        train-dit) set -- train-dit --dataset "$dataset" --lae "$lae" --config hypernet.toml --out "$out" "$@" ;;
        train-encoder) set -- train-encoder --kind image --config encoder.toml --out "$out" "$@" ;;
        train-base) set -- train-base --config base.toml --out "$out" "$@" ;;
    esac
    [[ $name == merge ]] && rm -rf "$out/model"
    mkdir -p "$out"
    line=("$@")
}
start() { # NAME OUT MORE…
    arguments "$@"
    nice -n 19 env LC_ALL="$locale" "$program" --quiet "${line[@]}" >stdout 2>stderr
}
spawn() { # NAME OUT MORE…: in the background; `exec`, so that $process is the program itself
    arguments "$@"
    (exec nice -n 19 env LC_ALL="$locale" "$program" --quiet "${line[@]}" >stdout.spawned 2>stderr.spawned) &
    process=$!
}
locale=C.UTF-8

# Hashes of the results: logs and reports hold times.
digest() {
    (cd "$1" && find . -type f ! -name '*.jsonl' ! -name report.json ! -name .lock ! -path '*/training/latents*' -o \
        -name manifest.jsonl | LC_ALL=C sort | xargs -r -d '\n' sha256sum)
}

continues() { # NAME OUT: prints --resume where there is a state
    case $1 in train-*) find "$2" -name '*.checkpoint.safetensors' 2>/dev/null | grep -q . && echo --resume ;; esac
}

# What the commands read, made once.
fixtures() {
    cd "$work" || exit 1
    photos=$work/people/person-0001 photo=$work/people/person-0001/0001.png lora=$work/lora/me.safetensors
    model=$work/model dataset=$work/dataset lae=$work/lae
    # As small as each command takes it: what is tested is how they write.
    sed 's/^train = .*/train = 4/; s/^held_out = .*/held_out = 1/; s/^people_per_batch = .*/people_per_batch = 2/
        s/^steps = .*/steps = 2/; s/^people = .*/people = 2/; s/^scenes = .*/scenes = 1/; s/^batch = .*/batch = 1/
        s/^references = .*/references = 1/; s/^rank = .*/rank = 1/' "$repository/configs/dataset-tiny.toml" >few.toml
    # Trainings of hypernetworks want 16 people.
    sed 's/^train = .*/train = 16/' few.toml >more.toml
    sed 's/latent = 64/latent = 2/; s/channels = 8/channels = 2/; s/^token = .*/token = 2/; s/^batch = .*/batch = 2/
        s/^folds = .*/folds = 2/; s/^width = .*/width = 8/; s/^heads = .*/heads = 2/; s/^depth = .*/depth = 1/
        s/^steps = [0-9][0-9].*/steps = 4/' "$repository/configs/hypernet-tiny.toml" >hypernet.toml
    sed 's/^steps = .*/steps = 3/; s/^batch = .*/batch = 4/; s/= 96$/= 24/; s/= 384/= 48/
        s/num_hidden_layers = 4/num_hidden_layers = 1/' "$repository/configs/encoder-tiny.toml" >encoder.toml
    sed 's/^steps = .*/steps = 2/; s/^batch = .*/batch = 2/; s/^people = .*/people = 4/; s/^each = .*/each = 1/
        s/^sheet_every = .*/sheet_every = 2/; s/\[32, 64, 128\]/[8, 8, 16]/' \
        "$repository/configs/base-tiny.toml" >base.toml
    [[ -e fixtures-made ]] && return
    rm -rf people lora model dataset lae reference
    start portraits people && start gen lora && "$program" --quiet lora --base tiny merge --lora "$lora" --out model >stdout 2>stderr &&
        "$program" --quiet build-dataset --config more.toml --out dataset >stdout 2>stderr && start train-lae lae || { echo "the fixtures cannot be made" >&2; cat stderr >&2; exit 1; }
    touch fixtures-made
}

# Calls by which a process changes files.
writing=write,pwrite64,openat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,link,linkat,fsync,fdatasync,ftruncate,chmod,fchmod
# Without --seccomp-bpf, with which strace 6.1 does not inject into programs of one thread.
traced() { nice -n 19 strace -f "$@" "$program" --quiet "${line[@]}" >stdout 2>stderr; }
tracer=
line=(--version)
traced -e trace=$writing -o /dev/null 2>/dev/null && tracer=strace

# The undisturbed run: its digest, its time in milliseconds, the time until its first file is begun, and where strace is
# installed each call that changes a file with its number among the calls of its thread.
reference() { # NAME
    [[ -e reference/$1.time ]] && return
    mkdir -p reference && rm -rf "reference/$1"
    local begin=$(date +%s%N) time
    start "$1" "reference/$1" || { note "reference-$1" FAILED "exit $?"; return 1; }
    time=$((($(date +%s%N) - begin) / 1000000))
    digest "reference/$1" >"reference/$1.digest"
    local first=$(find "reference/$1" -type f -exec stat -c %.3W {} + | sort -n | head -1)
    echo $((${first/./} - begin / 1000000)) >"reference/$1.first"
    if [[ -n $tracer ]]; then
        rm -rf traced && arguments "$1" traced && traced -e trace=$writing -o traced.log
        awk '/^[0-9]+ +[a-z0-9]+\(/ { call = $2; sub(/\(.*/, "", call); number = ++count[$1 " " call]
            if (call != "openat" || /O_CREAT|O_TMPFILE/) print call, number }' traced.log | sort -u >"reference/$1.calls"
    fi
    echo $time >"reference/$1.time"
}

# Files under a final name that are neither whole nor those of the undisturbed run.
torn_files() { # NAME OUT
    find "$2" -name '*.safetensors' ! -path '*/.difflora-*' ! -name '.*' -printf '%s %P\n' 2>/dev/null |
        while read -r size file; do
            cmp -s "reference/$1/$file" "$2/$file" && continue
            local header=$(od -An -tu8 -N8 "$2/$file" | tr -d ' ')
            local data=$(tail -c +9 "$2/$file" | head -c "${header:-0}" | grep -o '"data_offsets":\[[0-9]*,[0-9]*' |
                sed 's/.*,//' | sort -n | tail -1)
            ((size == 8 + ${header:-0} + ${data:-0})) || echo "$file"
        done
}

# Runs a command and kills it, every second one before a call that changes a file, the others at a random moment, three of
# four after the first file is begun. Sets `moment`. Fails where the command has ended before.
killed() { # NAME NUMBER
    rm -rf killed
    if [[ -n $tracer ]] && (($2 % 2)); then
        local call number
        read -r call number < <(shuf -n 1 "reference/$1.calls")
        moment="before $call $number"
        arguments "$1" killed
        { traced -e trace="$call" -e inject="$call:signal=KILL:when=$number" -o /dev/null; } 2>/dev/null
    else
        local first=0 wait
        (($2 % 8)) && first=$(cat "reference/$1.first")
        wait=$((RANDOM * 32768 + RANDOM))
        wait=$((first + wait % ($(cat "reference/$1.time") - first + 1)))
        moment="after $wait ms"
        arguments "$1" killed
        # `timeout` sets its clock before the program starts; 0 would mean none.
        wait=$((wait ? wait : 1))
        { nice -n 19 timeout -s KILL "$((wait / 1000)).$(printf %03d $((wait % 1000)))" \
            env LC_ALL="$locale" "$program" --quiet "${line[@]}" >stdout 2>stderr; } 2>/dev/null
    fi
    (($? == 137))
}

# Kill -9; then the same command again until it ends. Nothing is torn, and the end is the same.
kill_test() { # NAME NUMBER
    local test=kill-$1-$2 moment
    done_before "$test" && return
    reference "$1" || return
    local tries=0
    until killed "$@"; do ((++tries < 20)) || { echo "$test skipped: it always ended before it was killed" >>"$results"; return; }; done
    local torn=$(torn_files "$1" killed)
    [[ -z $torn ]] || { note "$test" FAILED "torn $moment: $torn"; return; }
    local begin=$(date +%s%N) more=$(continues "$1" killed)
    start "$1" killed $more || { note "$test" FAILED "cannot continue, killed $moment: exit $?"; return; }
    # How long it takes changes with what else the machine does.
    [[ -n $more ]] || echo $((($(date +%s%N) - begin) / 1000000)) >"reference/$1.time"
    digest killed >killed.digest
    if ! diff -q "reference/$1.digest" killed.digest >/dev/null; then
        note "$test" FAILED "other results, killed $moment: $(diff "reference/$1.digest" killed.digest | tr '\n' ' ')"
        cp -r killed "failed-$test"
    else
        note "$test" ok "$moment"
    fi
}

# A full disk: no panic, a clear error or warning; old files stay whole; with room the same results.
disk_test() { # NAME
    local test=disk-$1 disk=$work/disk
    done_before "$test" && return
    reference "$1" || return
    local size=$((4 * $(du -sm "reference/$1" | cut -f1) + 8))
    mkdir -p disk && mount -t tmpfs -o size=${size}m none disk 2>/dev/null || { echo "$test skipped: no right to mount" >>"$results"; return; }
    mkdir disk/out
    case $1 in merge) ;; *) cp -r "reference/$1/." disk/out/ ;; esac
    head -c ${size}M /dev/zero >disk/filler 2>/dev/null
    truncate -s -8192 disk/filler
    start "$1" disk/out
    local code=$?
    local panics=$(grep -c 'panicked\|RUST_BACKTRACE' stderr)
    local said=$(grep -ci 'space\|disk' stderr)
    rm -f disk/filler
    local damaged=$(cd disk/out && find . -type f -size 0 ! -name '*.jsonl' | head -1)
    start "$1" disk/out $(continues "$1" disk/out)
    local again=$?
    digest disk/out >disk.digest
    umount disk
    if ((panics)) || [[ -n $damaged ]] || { ((code)) && ! ((said)); }; then
        note "$test" FAILED "exit $code, panics $panics, empty files: $damaged"
    elif ((again)) || ! diff -q "reference/$1.digest" disk.digest >/dev/null; then
        note "$test" FAILED "with room: exit $again, $(diff "reference/$1.digest" disk.digest | tr '\n' ' ')"
    else
        note "$test" ok
    fi
}

# A second process on the same output is refused with the first one's id. The first is stopped while it holds the lock.
two_test() { # NAME
    local test=two-$1 process code owner
    done_before "$test" && return
    for _ in 1 2 3 4 5; do
        rm -rf two
        spawn "$1" two
        until find two -name .lock -size +0 2>/dev/null | grep -q . || ! kill -0 $process 2>/dev/null; do sleep 0.01; done
        # It stops a little after the signal, if it has not ended.
        kill -STOP $process 2>/dev/null
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            grep -q 'State:.*\(stopped\|zombie\)' "/proc/$process/status" 2>/dev/null || [[ ! -e /proc/$process ]] && break
            sleep 0.01
        done
        if grep -q 'State:.*stopped' "/proc/$process/status" 2>/dev/null; then
            owner=$(cat "$(find two -name .lock | head -1)" 2>/dev/null)
            start "$1" two
            code=$?
            kill -CONT $process
            wait $process
            { ((code == 2)) && grep -q "process $owner" stderr; } && note "$test" ok || note "$test" FAILED "exit $code"
            return
        fi
        kill -CONT $process 2>/dev/null
        wait $process
    done
    note "$test" FAILED "it always ended before the second one began"
}

# Hostile inputs under a limit of memory: refused with one of the program's exit codes, in bounded time.
hostile() { # NAME ARGUMENTS…
    local test=hostile-$1
    shift
    done_before "$test" && return
    (ulimit -v 6000000; exec timeout 60 "$program" --quiet "$@" >stdout 2>stderr)
    local code=$?
    case $code in
        2 | 3 | 4) grep -q panicked stderr && note "$test" FAILED panic || note "$test" ok ;;
        *) note "$test" FAILED "exit $code" ;;
    esac
}
hostile_tests() {
    mkdir -p odd
    printf '\xff\xff\xff\xff\xff\xff\xff\x7f{}' >odd/length.safetensors
    printf '\x20\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[-1' >odd/shape.safetensors
    { printf '\x80\x96\x98\x00\x00\x00\x00\x00'; head -c 10000000 /dev/zero | tr '\0' '['; } >odd/nested.safetensors
    { printf '\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00'; head -c 64 /dev/zero; } >odd/side.png
    { printf 'GIF89a\xff\xff\xff\xff\x00\x00\x00'; head -c 64 /dev/urandom; } >odd/noise.gif
    head -c 4096 /dev/urandom >odd/noise.jpg
    head -c 200000 /dev/zero | tr '\0' '[' >odd/nested.toml
    echo 'lora = { rank = 9223372036854775807 }' >odd/rank.toml
    head -c 4096 /dev/urandom >odd/noise.toml
    mkfifo odd/pipe.png odd/pipe.toml 2>/dev/null
    for file in length shape nested; do
        hostile "lora-$file" gen --lora "odd/$file.safetensors" --prompt x --out odd/out.png
        hostile "base-$file" gen --base "odd/$file.safetensors" --prompt x --out odd/out.png
    done
    for file in side.png noise.gif noise.jpg pipe.png; do hostile "image-$file" gen --ref "odd/$file" --lora-out odd/out.safetensors; done
    for file in nested rank noise pipe; do
        hostile "config-$file" train-lora "$photos" --out odd/a.safetensors --config "odd/$file.toml"
        hostile "dataset-$file" build-dataset --out odd/dataset --config "odd/$file.toml"
    done
    hostile width gen --prompt x --width 16384 --height 16384 --out odd/out.png
    hostile original gen --prompt x --original-size 99999999999x1 --out odd/out.png
    # A model of which one file is something else.
    for file in tokenizer/vocab.json tokenizer/merges.txt unet/config.json text_encoder/config.json scheduler/scheduler_config.json; do
        rm -rf odd/model && cp -r "$model" odd/model
        head -c 100000 /dev/zero | tr '\0' '[' >"odd/model/$file"
        hostile "model-nested-$(basename "$file")-$(dirname "$file")" gen --base odd/model --prompt x --out odd/out.png
        head -c 5000 /dev/urandom >"odd/model/$file"
        hostile "model-noise-$(basename "$file")-$(dirname "$file")" gen --base odd/model --prompt x --out odd/out.png
    done
}

# Many files, few file descriptors, other locales.
surroundings() {
    local code
    if ! done_before many; then
        mkdir -p many && (cd many && seq -f '%g.png' $many | xargs touch)
        timeout 120 "$program" face detect many >stdout 2>stderr
        code=$?
        ((code != 0 && code < 124 && $(wc -l <stderr) < 40)) && note many ok || note many FAILED "exit $code, $(wc -l <stderr) lines"
        rm -rf many
    fi
    for name in gen train-lora build-dataset merge; do
        done_before "descriptors-$name" && continue
        reference "$name" || continue
        rm -rf few && (ulimit -n 64; start "$name" few)
        code=$?
        digest few >few.digest
        ((code == 0)) && diff -q "reference/$name.digest" few.digest >/dev/null && note "descriptors-$name" ok ||
            note "descriptors-$name" FAILED "exit $code"
    done
    reference gen || return
    for locale in C de_DE.UTF-8 tr_TR.UTF-8 ar_EG.UTF-8 ja_JP.SJIS; do
        done_before "locale-$locale" && continue
        rm -rf local && start gen local
        code=$?
        digest local >local.digest
        ((code == 0)) && diff -q reference/gen.digest local.digest >/dev/null && note "locale-$locale" ok ||
            note "locale-$locale" FAILED "exit $code"
    done
    locale=C.UTF-8
}

fixtures
for part in ${FAULTS_PARTS:-hostile surroundings two disk kill}; do
    case $part in
        hostile) hostile_tests ;;
        surroundings) surroundings ;;
        two) for name in train-lora build-dataset train-lae train-encoder train-base; do two_test "$name"; done ;;
        disk) for name in "${commands[@]}"; do disk_test "$name"; done ;;
        # Number by number, so that a long run that is stopped has tried every command about as often.
        kill)
            for number in $(seq "$kills"); do
                for name in "${commands[@]}"; do kill_test "$name" "$number"; done
            done
            ;;
        *) echo "$part is no part: hostile, surroundings, two, disk, kill" >&2 && exit 2 ;;
    esac
done
failed=$(grep -c ' FAILED' "$results")
echo "faults: $(grep -c ' ok' "$results") passed, $failed failed, $(grep -c skipped "$results") skipped; $results"
((failed == 0))
