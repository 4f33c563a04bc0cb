//! Captions that name everything that varies in the aligned world, in several phrasings.
//!
//! ```text
//! HEAD[, SCENE or IDENTITY part]…
//! ```
//! for example `a watercolour of a person, long narrow nose, very pale skin, in red cap, at the beach`. A part is a
//! noun with its adjectives; adjectives grade a factor of the identity in five levels, of which the middle has none.
//! The parts that a caption leaves out are random; but glasses, hats, turned heads and the like are never left out, since a
//! model that meets them unnamed paints them anywhere.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::synthetic::people::{
    Backdrop, Beard, Clothing, Colour, Expression, EyeColour, Facing, Framing, Glasses, HairColour,
    HairStyle, Hat, Held, Identity, Lighting, Person, Scene, Style,
};

/// How much a description says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Detail {
    /// Everything, in the fixed order of the lists.
    All,
    /// Style, subject and what must not be left out.
    Short,
    /// Everything about the scene and nothing about the person, in the fixed order.
    Scene,
    /// A random part, in random order and phrasing.
    Random,
}

/// A caption of `person` in `scene`, which calls the person `subject`.
pub fn describe(person: &Person, scene: &Scene, subject: &str, detail: Detail, rng: &mut impl Rng) -> String {
    let varied = detail == Detail::Random;
    let style = scene.style.word();
    let heads = [
        format!("a {style} of a {subject}"),
        format!("{style} of a {subject}"),
        format!("a {style} portrait of a {subject}"),
    ];
    let head = if varied { heads[rng.random_range(0..4usize) % 3].clone() } else { heads[0].clone() };

    let mut parts = needed_parts(scene, varied, rng);
    if detail != Detail::Short {
        let keep = |rng: &mut dyn rand::RngCore| !varied || rng.random_bool(0.85);
        if keep(rng) {
            parts.push(scene.expression.word().to_owned());
        }
        if scene.backdrop == Backdrop::Plain && keep(rng) {
            parts.push(format!("{} background", scene.background.word()));
        }
        if keep(rng) {
            parts.push(clothing(scene, varied, rng));
        }
        let mut identity = match detail {
            Detail::Scene => Vec::new(),
            _ => graded_words(&person.identity),
        };
        if varied {
            // A quarter of the captions say nothing of the person, nearly half say all.
            let share = [0.0, 1.0, 1.0, rng.random::<f64>()].choose(rng).copied().unwrap_or(1.0);
            identity.retain(|_| rng.random_bool(share));
        }
        parts.extend(identity);
    }
    if varied {
        parts.shuffle(rng);
    }
    fit(head, parts, scene)
}

/// Words and commas that a caption may have; the text encoders see 77 tokens with the two at the ends.
const LONGEST: usize = 74;

/// The caption, without the last parts of the identity where it would be too long.
fn fit(head: String, parts: Vec<String>, scene: &Scene) -> String {
    let needed = |part: &String| !is_identity(part, scene);
    let length = |part: &str| part.split(' ').count() + 1;
    let mut room = LONGEST.saturating_sub(length(&head));
    room = room.saturating_sub(parts.iter().filter(|part| needed(part)).map(|part| length(part)).sum());
    let mut caption = head;
    for part in parts {
        if !needed(&part) {
            if length(&part) > room {
                continue;
            }
            room -= length(&part);
        }
        caption.push_str(", ");
        caption.push_str(&part);
    }
    caption
}

fn is_identity(part: &str, scene: &Scene) -> bool {
    part != scene.expression.word() && NOUNS.iter().any(|noun| part.ends_with(noun))
}

/// The last words of identity parts.
const NOUNS: &[&str] = &[
    "skin",
    "face",
    "jaw",
    "chin",
    "eyes",
    "brows",
    "nose",
    "mouth",
    "lips",
    "hair",
    "parting",
    "fringe",
    "bald",
    "hairline",
    "freckles",
    "ears",
    "moustache",
    "beard",
    "goatee",
];

/// Parts that every caption has.
fn needed_parts(scene: &Scene, varied: bool, rng: &mut impl Rng) -> Vec<String> {
    let mut parts = Vec::new();
    let either = |one: String, other: String, rng: &mut dyn rand::RngCore| {
        if varied && rng.random_bool(0.5) { other } else { one }
    };
    if scene.facing() != Facing::Ahead {
        parts.push(scene.facing().word().to_owned());
    }
    if scene.glasses != Glasses::None {
        let word = scene.glasses.word();
        parts.push(either(format!("wearing {word}"), format!("with {word}"), rng));
    }
    if scene.hat != Hat::None {
        let (colour, word) = (scene.cloth.word(), scene.hat.word());
        parts.push(either(format!("wearing {colour} {word}"), format!("in {colour} {word}"), rng));
    }
    if scene.backdrop != Backdrop::Plain {
        parts.push(match scene.backdrop {
            Backdrop::Plain => String::new(),
            Backdrop::Beach => either("at the beach".into(), "on a beach".into(), rng),
            Backdrop::Forest => either("in a forest".into(), "in the forest".into(), rng),
            Backdrop::City => either("in the city".into(), "in a city".into(), rng),
            Backdrop::Mountains => "in the mountains".into(),
            Backdrop::Night => either("at night".into(), "under a night sky".into(), rng),
            Backdrop::Library => either("in a library".into(), "in the library".into(), rng),
        });
    }
    if scene.held != Held::Nothing {
        let word = scene.held.word();
        parts.push(either(format!("holding {word}"), format!("with a {word}"), rng));
    }
    if scene.lighting != Lighting::Even {
        parts.push(scene.lighting.word().to_owned());
    }
    if scene.framing() != Framing::Normal {
        parts.push(scene.framing().word().to_owned());
    }
    parts
}

fn clothing(scene: &Scene, varied: bool, rng: &mut impl Rng) -> String {
    let (colour, word) = (scene.cloth.word(), scene.clothing.word());
    match (scene.clothing, varied && rng.random_bool(0.5)) {
        (Clothing::Striped, false) => format!("wearing striped {colour} shirt"),
        (Clothing::Striped, true) => format!("striped {colour} shirt"),
        (_, false) => format!("wearing {colour} {word}"),
        (_, true) => format!("{colour} {word}"),
    }
}

/// The identity in words: one part for each noun whose factor is not average.
pub fn graded_words(identity: &Identity) -> Vec<String> {
    let who = identity;
    let mut parts = Vec::new();
    let mut say = |adjectives: &[Option<String>], noun: &str, otherwise: Option<&str>| {
        let said: Vec<&str> = adjectives.iter().flatten().map(String::as_str).collect();
        match (said.is_empty(), otherwise) {
            (true, None) => {}
            (true, Some(word)) => parts.push(format!("{word} {noun}")),
            (false, _) => parts.push(format!("{} {noun}", said.join(" "))),
        }
    };
    let tone = ["very pale", "pale", "tan", "brown", "very dark"][((who.skin * 5.0) as usize).min(4)];
    say(&[Some(tone.into()), grade(who.skin_hue, "rosy", "golden")], "skin", None);
    say(
        &[grade(who.face_height, "short", "long"), grade(who.face_width, "narrow", "wide")],
        "face",
        Some("oval"),
    );
    say(&[grade(who.jaw, "pointed", "square")], "jaw", None);
    say(&[grade(who.chin, "broad", "narrow")], "chin", None);
    say(
        &[
            grade(who.eye_size, "small", "large"),
            grade(who.eye_opening, "narrow", "round"),
            Some(who.eye_colour_kind().word().trim_end_matches(" eyes").into()),
        ],
        "eyes",
        None,
    );
    say(
        &[
            grade(who.eye_spacing, "close", "distant"),
            grade(who.eye_height, "high", "low"),
            grade(who.eye_tilt, "downturned", "upturned"),
        ],
        "eyes",
        None,
    );
    say(
        &[
            grade(who.brow_thickness, "thin", "thick"),
            grade(who.brow_height, "low", "high"),
            grade(who.brow_angle, "drooping", "raised"),
        ],
        "brows",
        Some("average"),
    );
    say(
        &[grade(who.nose_length, "short", "long"), grade(who.nose_width, "narrow", "wide")],
        "nose",
        Some("average"),
    );
    say(&[grade(who.mouth_width, "narrow", "wide"), grade(who.mouth_height, "high", "low")], "mouth", None);
    say(&[grade(who.lip_thickness, "thin", "full"), grade(who.lip_colour, "pale", "red")], "lips", None);
    if who.freckles > 0.80 {
        let many = who.freckles > 0.92;
        say(&[many.then(|| "many".to_owned())], "freckles", Some("some"));
    }
    say(&[grade(who.ear_size, "small", "large")], "ears", None);
    match who.hair_style_kind() {
        HairStyle::Bald => parts.push("bald".into()),
        style => {
            let colour = who.hair_colour_kind().word().trim_end_matches(" hair");
            let shade = match who.hair_shade() {
                shade if shade < 0.3 => "deep ",
                shade if shade > 0.7 => "light ",
                _ => "",
            };
            let volume = grade(who.hair_volume, "flat", "thick").map_or(String::new(), |word| word + " ");
            parts.push(match style {
                HairStyle::Side | HairStyle::Fringe => {
                    format!("{}, {volume}{shade}{colour} hair", style.word())
                }
                _ => format!("{} {volume}{shade}{colour} hair", style.word().trim_end_matches(" hair")),
            });
            parts.extend(grade(who.hairline, "high", "low").map(|word| format!("{word} hairline")));
        }
    }
    if who.beard_kind() != Beard::None {
        parts.push(who.beard_kind().word().to_owned());
    }
    parts
}

/// The word for a factor in five levels; the middle has none.
fn grade(factor: f32, low: &str, high: &str) -> Option<String> {
    match factor {
        factor if factor < 0.12 => Some(format!("very {low}")),
        factor if factor < 0.36 => Some(low.to_owned()),
        factor if factor <= 0.64 => None,
        factor if factor <= 0.88 => Some(high.to_owned()),
        _ => Some(format!("very {high}")),
    }
}

/// Every word that a description can contain.
pub(super) fn words() -> Vec<&'static str> {
    let own: &[&str] = &[
        "a of portrait the in at on under with wearing holding background sky very average oval some many",
        "pale tan brown dark rosy golden skin face jaw chin eyes brows nose mouth lips freckles ears hair hairline",
        "short long narrow wide pointed square broad small large round close distant high low downturned upturned",
        "thin thick drooping raised full red flat deep light",
    ];
    let lists = [
        own,
        Style::WORDS,
        Expression::WORDS,
        &Facing::WORDS[1..],
        &Glasses::WORDS[1..],
        &Hat::WORDS[1..],
        &Backdrop::WORDS[1..],
        Clothing::WORDS,
        &Held::WORDS[1..],
        &Lighting::WORDS[1..],
        &Framing::WORDS[1..],
        Colour::WORDS,
        HairStyle::WORDS,
        HairColour::WORDS,
        EyeColour::WORDS,
        &Beard::WORDS[1..],
    ];
    lists.into_iter().flatten().flat_map(|phrase| phrase.split(' ')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Person, vocabulary};
    use crate::train;

    #[test]
    fn a_full_description_names_everything_and_a_short_one_what_it_must() {
        let person = Person::new(0, 1);
        let scene = Scene {
            style: Style::Watercolour,
            expression: Expression::Smiling,
            yaw: -0.3,
            glasses: Glasses::Dark,
            hat: Hat::Cap,
            cloth: Colour::Red,
            backdrop: Backdrop::Beach,
            held: Held::Cup,
            lighting: Lighting::Warm,
            scale: 0.9,
            clothing: Clothing::Suit,
            ..Scene::aligned_for(&person, 0)
        };
        let mut rng = train::rng(0, 0);
        let needed =
            "facing left, wearing sunglasses, wearing red cap, at the beach, holding cup, warm light";
        assert_eq!(
            describe(&person, &scene, "sks person", Detail::Short, &mut rng),
            format!("a watercolour of a sks person, {needed}")
        );
        let all = describe(&person, &scene, "person", Detail::All, &mut rng);
        assert!(
            all.starts_with(&format!("a watercolour of a person, {needed}, smiling, wearing red suit, ")),
            "{all}"
        );
        assert!(all.contains(" eyes") && all.contains(" skin"), "{all}");
    }

    #[test]
    fn descriptions_are_short_enough_and_made_of_the_vocabulary() {
        let known = vocabulary();
        let mut rng = train::rng(1, 0);
        for number in 0..400 {
            let person = Person::new(9, number);
            let scene = Scene::aligned_for(&person, 0);
            for detail in [Detail::All, Detail::Random, Detail::Short] {
                let text = describe(&person, &scene, "sks person", detail, &mut rng);
                for word in text.split([',', ' ']).filter(|word| !word.is_empty()) {
                    assert!(known.contains(&word), "`{word}` of `{text}`");
                }
                let tokens = text.split(' ').count() + text.matches(',').count();
                assert!(tokens <= 75, "{tokens}: {text}");
                if scene.hat != Hat::None {
                    assert!(text.contains(scene.hat.word()), "{text}");
                }
            }
        }
    }

    #[test]
    fn grades_have_five_levels() {
        let words = [0.0, 0.2, 0.5, 0.8, 1.0].map(|factor| grade(factor, "short", "long"));
        let wanted = [Some("very short"), Some("short"), None, Some("long"), Some("very long")];
        assert_eq!(words.each_ref().map(Option::as_deref), wanted);
    }
}
