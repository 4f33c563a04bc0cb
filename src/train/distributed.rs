//! Several processes that train one network: each takes a part of the shards of every step, and all make the step with
//! the mean of all gradients.
//!
//! Processes find each other by torchrun's environment variables: `WORLD_SIZE` processes, each with its `RANK` from 0,
//! meet at `MASTER_ADDR`:`MASTER_PORT`, where rank 0 listens. Gradients go through its sums in the order of the ranks,
//! so that all processes hold the same bits, and they hold those of one process that computes all shards, up to the
//! order of sums. Only rank 0 writes files.
//!
//! In a build with the feature `nccl`, gradients that are on GPUs stay there (`nccl.rs`); loss and figures, a few numbers,
//! go through rank 0 all the same.
//!
//! ```text
//! WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 difflora train-dit … &
//! WORLD_SIZE=2 RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 difflora train-dit …
//! ```

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use crate::failure::Failure;
use crate::train::gradients::Sum;
#[cfg(feature = "nccl")]
use crate::train::nccl::{self, Gpus};

/// Processes that train together.
pub struct ProcessGroup {
    rank: usize,
    world: usize,
    /// Rank 0: one to each other rank, in order. The others: one to rank 0.
    peers: Mutex<Vec<TcpStream>>,
    /// From the first gradients on a GPU on.
    #[cfg(feature = "nccl")]
    gpus: Mutex<Option<Gpus>>,
}

static GROUP: OnceLock<ProcessGroup> = OnceLock::new();

/// The group of this process, where it has one.
pub fn group() -> Option<&'static ProcessGroup> {
    GROUP.get()
}

/// Whether this process writes files: the only one, or the first of its group.
pub fn is_main_process() -> bool {
    group().is_none_or(|group| group.rank == 0)
}

/// How many processes the environment names, before they have met; 1 where it names none.
pub fn world_size() -> usize {
    // Joining the group reports what is wrong with the variable.
    number("WORLD_SIZE").ok().flatten().unwrap_or(1).max(1)
}

/// Joins the group that the environment names, if it names one.
///
/// # Errors
/// [`Failure::Usage`] for variables that make no sense; others who do not come within a minute.
pub fn join() -> Result<()> {
    let Some(world) = number("WORLD_SIZE")?.filter(|world| *world > 1) else { return Ok(()) };
    if GROUP.get().is_some() {
        return Ok(());
    }
    let rank = number("RANK")?.context("WORLD_SIZE is set, RANK is not")?;
    let address = std::env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".into());
    let port = number("MASTER_PORT")?.unwrap_or(29500);
    let group = ProcessGroup::init(&format!("{address}:{port}"), rank, world)?;
    GROUP.set(group).map_err(|_| anyhow::anyhow!("a group was joined twice"))
}

fn number(name: &str) -> Result<Option<usize>> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    let value = text.parse().map_err(|_| Failure::Usage(format!("{name}={text} is no number")))?;
    Ok(Some(value))
}

impl ProcessGroup {
    /// Waits for all `world` processes at `address`.
    pub fn init(address: &str, rank: usize, world: usize) -> Result<Self> {
        ensure!(rank < world, Failure::Usage(format!("RANK={rank} of WORLD_SIZE={world}")));
        let until = Instant::now() + Duration::from_secs(60);
        let late = || format!("rank {rank} of {world}: the others did not come to {address} within a minute");
        let mut peers = Vec::new();
        if rank == 0 {
            let listener =
                TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
            listener.set_nonblocking(true)?;
            let mut arrived: Vec<Option<TcpStream>> = (1..world).map(|_| None).collect();
            while arrived.iter().any(Option::is_none) {
                match listener.accept() {
                    Ok((mut peer, _)) => {
                        peer.set_nonblocking(false)?;
                        let mut who = [0; 4];
                        peer.read_exact(&mut who)?;
                        let who = u32::from_le_bytes(who) as usize;
                        ensure!(who > 0 && who < world, "rank {who} came to a group of {world}");
                        ensure!(arrived[who - 1].is_none(), "two processes have rank {who}");
                        peer.set_nodelay(true)?;
                        arrived[who - 1] = Some(peer);
                    }
                    Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                    Err(error) => return Err(error).with_context(late),
                }
            }
            peers.extend(arrived.into_iter().flatten());
        } else {
            let mut peer = loop {
                match TcpStream::connect(address) {
                    Ok(peer) => break peer,
                    Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
                    Err(error) => return Err(error).with_context(late),
                }
            };
            peer.set_nodelay(true)?;
            peer.write_all(&(rank as u32).to_le_bytes())?;
            peers.push(peer);
        }
        Ok(Self {
            rank,
            world,
            peers: Mutex::new(peers),
            #[cfg(feature = "nccl")]
            gpus: Mutex::default(),
        })
    }

    /// Its shards among `shards`.
    ///
    /// # Errors
    /// When they do not part evenly: every process must have the same work.
    pub fn own_shards(&self, shards: usize) -> Result<std::ops::Range<usize>> {
        ensure!(
            shards.is_multiple_of(self.world),
            Failure::Usage(format!(
                "{shards} shards do not part among {} processes; make `shards` a multiple of it",
                self.world
            ))
        );
        let own = shards / self.world;
        Ok(self.rank * own..(self.rank + 1) * own)
    }

    /// The mean over all processes, in the place of each one's own.
    ///
    /// # Errors
    /// Another process that has gone, or that trains something else.
    pub fn mean(&self, sum: &mut Sum) -> Result<()> {
        #[cfg(feature = "nccl")]
        if let Some(gpu) = nccl::gpu(&sum.gradients) {
            let mut gradients = std::mem::take(&mut sum.gradients);
            // First the few numbers: there a process that has gone is noticed, or one that trains something else.
            self.mean_by_tcp(sum, gradients.values().map(Tensor::elem_count).sum())?;
            let mut gpus = self.gpus.lock().expect("nothing panics while it holds the GPUs");
            let gpus = match &mut *gpus {
                Some(gpus) => gpus,
                none => none.insert(self.join_gpus(&gpu)?),
            };
            gpus.mean(&mut gradients)?;
            sum.gradients = gradients;
            return Ok(());
        }
        self.mean_by_tcp(sum, 0)
    }

    /// Rank 0 names the meeting of the GPUs to the others.
    #[cfg(feature = "nccl")]
    fn join_gpus(&self, gpu: &candle_core::CudaDevice) -> Result<Gpus> {
        let mut peers = self.peers.lock().expect("nothing panics while it holds the connections");
        let mut name = [0; 128];
        if self.rank == 0 {
            name = nccl::name()?;
            peers.iter_mut().try_for_each(|peer| peer.write_all(&name))?;
        } else if let Some(peer) = peers.first_mut() {
            peer.read_exact(&mut name)?;
        }
        Gpus::init(gpu, self.rank, self.world, &name)
    }

    /// [`ProcessGroup::mean`] of what is on the CPU or can be copied there; `elsewhere` numbers go another way.
    fn mean_by_tcp(&self, sum: &mut Sum, elsewhere: usize) -> Result<()> {
        let mut values = vec![sum.loss as f32];
        values.extend(sum.parts.iter().map(|(_, value)| *value as f32));
        for gradient in sum.gradients.values() {
            values.extend(gradient.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?);
        }
        self.all_mean(&mut values, elsewhere)?;
        let mut rest = values.as_slice();
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at(count);
            rest = left;
            taken
        };
        sum.loss = f64::from(take(1)[0]);
        for (_, value) in &mut sum.parts {
            *value = f64::from(take(1)[0]);
        }
        for gradient in sum.gradients.values_mut() {
            let mean = Tensor::from_slice(take(gradient.elem_count()), gradient.shape(), gradient.device())?;
            *gradient = mean.to_dtype(gradient.dtype())?;
        }
        Ok(())
    }

    fn all_mean(&self, values: &mut [f32], elsewhere: usize) -> Result<()> {
        let count = [values.len(), elsewhere];
        let mut peers = self.peers.lock().expect("nothing panics while it holds the connections");
        let gone = |rank: usize| format!("rank {rank} has left the group; its own message says why");
        if self.rank == 0 {
            for (peer, rank) in peers.iter_mut().zip(1..) {
                let theirs = receive(peer, count).with_context(|| gone(rank))?;
                values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
            }
            let part = 1.0 / self.world as f32;
            values.iter_mut().for_each(|value| *value *= part);
            for (peer, rank) in peers.iter_mut().zip(1..) {
                send(peer, values, elsewhere).with_context(|| gone(rank))?;
            }
        } else if let Some(peer) = peers.first_mut() {
            send(peer, values, elsewhere).with_context(|| gone(0))?;
            values.copy_from_slice(&receive(peer, count).with_context(|| gone(0))?);
        }
        Ok(())
    }
}

fn send(peer: &mut TcpStream, values: &[f32], elsewhere: usize) -> Result<()> {
    let mut bytes = [values.len(), elsewhere].map(|count| (count as u64).to_le_bytes()).concat();
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    Ok(peer.write_all(&bytes)?)
}

/// As many values as `count` says first; the other number must be equal.
fn receive(peer: &mut TcpStream, count: [usize; 2]) -> Result<Vec<f32>> {
    let mut sent = [0; 2];
    for sent in &mut sent {
        let mut bytes = [0; 8];
        peer.read_exact(&mut bytes)?;
        *sent = u64::from_le_bytes(bytes) as usize;
    }
    ensure!(
        sent == count,
        "it sent {} and {} numbers, {} and {} were expected: it trains something else, or on another kind of device",
        sent[0],
        sent[1],
        count[0],
        count[1]
    );
    let mut bytes = vec![0; 4 * count[0]];
    peer.read_exact(&mut bytes)?;
    Ok(bytes
        .chunks_exact(4)
        .map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;

    use super::*;

    /// A port that is free now.
    fn address() -> String {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
    }

    fn sum(rank: usize) -> Sum {
        let gradient = Tensor::new(&[[rank as f32, 1.0], [2.0, 4.0 * rank as f32]], &Device::Cpu).unwrap();
        let gradients = BTreeMap::from([("w".to_string(), gradient)]);
        Sum { loss: rank as f64, parts: vec![("part", 3.0 * rank as f64)], gradients }
    }

    #[test]
    fn three_processes_hold_the_mean_of_their_gradients() {
        let address = &address();
        let means: Vec<Sum> = std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..3)
                .map(|rank| {
                    scope.spawn(move || {
                        let group = ProcessGroup::init(address, rank, 3).unwrap();
                        assert_eq!(group.own_shards(6).unwrap(), 2 * rank..2 * rank + 2);
                        assert!(group.own_shards(4).unwrap_err().to_string().contains("shards"));
                        let mut own = sum(rank);
                        group.mean(&mut own).unwrap();
                        group.mean(&mut own).unwrap();
                        own
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for mean in means {
            assert_eq!((mean.loss, mean.parts[0]), (1.0, ("part", 3.0)));
            assert_eq!(mean.gradients["w"].to_vec2::<f32>().unwrap(), [[1.0, 1.0], [2.0, 4.0]]);
        }
    }

    #[test]
    fn a_process_that_trains_something_else_is_refused() {
        let address = &address();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut other = sum(1);
                other.parts.push(("more", 1.0));
                ProcessGroup::init(address, 1, 2).unwrap().mean(&mut other).unwrap_err();
            });
            let message =
                format!("{:#}", ProcessGroup::init(address, 0, 2).unwrap().mean(&mut sum(0)).unwrap_err());
            assert!(message.contains("it sent 7 and 0 numbers, 6 and 0 were expected"), "{message}");
        });
    }

    #[test]
    fn a_process_that_leaves_is_named() {
        let address = &address();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                let group = ProcessGroup::init(address, 0, 2).unwrap();
                format!("{:#}", group.mean(&mut sum(0)).unwrap_err())
            });
            scope.spawn(move || drop(ProcessGroup::init(address, 1, 2).unwrap()));
            let message = first.join().unwrap();
            assert!(message.contains("rank 1 has left"), "{message}");
        });
    }
}
