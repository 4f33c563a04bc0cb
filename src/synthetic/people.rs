//! People and scenes: identity factors are those of a person, scenes change from image to image.
//!
//! Everything is drawn from ChaCha8 under a key of (seed, what for, person, image), so that person 7
//! is the same whether or not persons 1 to 6 were ever drawn.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// A person of the small world: fixed by a seed and a number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Person {
    /// Seed of the population.
    pub seed: u64,
    /// Number within the population.
    pub number: u64,
    /// Factors shared by all images of the person.
    pub identity: Identity,
}

impl Person {
    /// Person `number` of the population `seed`; all factors are independent and uniform in [0, 1).
    pub fn new(seed: u64, number: u64) -> Self {
        let mut rng = stream(seed, *b"identity", number, 0);
        let identity = Identity::from_array(std::array::from_fn(|_| rng.random()));
        Self { seed, number, identity }
    }
}

/// Declares [`Identity`] and the same factors as an array with names.
macro_rules! identity_factors {
    ($count:literal: $($(#[$doc:meta])* $name:ident,)*) => {
        /// Identity of a person: factors in [0, 1], a few of them read as categories.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        pub struct Identity { $($(#[$doc])* pub $name: f32,)* }

        impl Identity {
            /// How many factors there are.
            pub const COUNT: usize = $count;
            /// Names of the factors, in the order of [`Identity::to_array`].
            pub const NAMES: [&'static str; $count] = [$(stringify!($name)),*];

            /// The factors as numbers, for regressions.
            pub fn to_array(&self) -> [f32; $count] {
                [$(self.$name),*]
            }

            /// The identity with these factors, in the order of [`Identity::NAMES`].
            pub fn from_array([$($name),*]: [f32; $count]) -> Self {
                Self { $($name),* }
            }
        }
    };
}

identity_factors! { 28:
    /// Skin from pale to dark.
    skin,
    /// Skin from bluish to yellowish.
    skin_hue,
    /// Width of the head.
    face_width,
    /// Height of the head.
    face_height,
    /// Jaw from pointed to square.
    jaw,
    /// How much the face narrows towards the chin.
    chin,
    /// Distance between the eyes.
    eye_spacing,
    /// Height of the eyes in the face, from high to low.
    eye_height,
    /// Size of the eyes.
    eye_size,
    /// Opening of the eyes from narrow to round.
    eye_opening,
    /// Slant of the eyes.
    eye_tilt,
    /// Eye colour, read as a category.
    eye_colour,
    /// Thickness of the brows.
    brow_thickness,
    /// Distance of the brows from the eyes.
    brow_height,
    /// Slant of the brows.
    brow_angle,
    /// Length of the nose.
    nose_length,
    /// Width of the nose.
    nose_width,
    /// Width of the mouth.
    mouth_width,
    /// Thickness of the lips.
    lip_thickness,
    /// Distance from nose to mouth.
    mouth_height,
    /// Lips from pale to red.
    lip_colour,
    /// Hair colour, read as a category with a shade inside it.
    hair_colour,
    /// Hair style, read as a category.
    hair_style,
    /// Hairline from high to low.
    hairline,
    /// Volume of the hair.
    hair_volume,
    /// Beard, read as a category.
    beard,
    /// Freckles: none in the lower three quarters, then ever more.
    freckles,
    /// Size of the ears.
    ear_size,
}

/// Declares an enumeration of named choices with the words that captions use for them.
macro_rules! choices {
    ($(#[$doc:meta])* $kind:ident { $($variant:ident => $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $kind { $(#[doc = $word] $variant,)* }

        impl $kind {
            /// Every choice, in the order of its class number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// Words of the choices in captions, in the same order.
            pub const WORDS: &'static [&'static str] = &[$($word),*];

            /// Word in captions.
            pub fn word(self) -> &'static str {
                Self::WORDS[self as usize]
            }

            /// Whether it is the first choice; records leave some of these out, so that old ones stay as they were.
            #[allow(dead_code, clippy::trivially_copy_pass_by_ref)]
            fn is_first(&self) -> bool {
                *self as usize == 0
            }
        }
    };
}

choices! {
    /// Hair style.
    HairStyle {
        Bald => "bald", Short => "short hair", Side => "side parting",
        Long => "long hair", Curly => "curly hair", Fringe => "fringe",
    }
}
choices! {
    /// Hair colour.
    HairColour {
        Black => "black hair", DarkBrown => "dark brown hair", Brown => "brown hair",
        Blond => "blond hair", Red => "red hair", Grey => "grey hair",
    }
}
choices! {
    /// Eye colour.
    EyeColour {
        Brown => "brown eyes", Hazel => "hazel eyes", Green => "green eyes", Blue => "blue eyes", Grey => "grey eyes",
    }
}
choices! {
    /// Beard.
    Beard { None => "no beard", Moustache => "moustache", Full => "beard", Goatee => "goatee", }
}
choices! {
    /// Expression of the face.
    Expression { Neutral => "neutral", Smiling => "smiling", Surprised => "surprised", Sad => "sad", }
}
choices! {
    /// Where the face looks, as seen in the image.
    Facing { Ahead => "facing ahead", Left => "facing left", Right => "facing right", }
}
choices! {
    /// Glasses.
    Glasses { None => "no glasses", Clear => "glasses", Dark => "sunglasses", }
}
choices! {
    /// Hat.
    Hat { None => "no hat", Cap => "cap", Beanie => "beanie", }
}
choices! {
    /// How the image is made.
    Style {
        Photo => "photo", Sketch => "sketch", Painting => "painting", Cartoon => "cartoon",
        Watercolour => "watercolour", Pastel => "pastel", Blueprint => "blueprint", Woodcut => "woodcut",
        Mosaic => "mosaic", Comic => "comic", Charcoal => "charcoal", Neon => "neon", Sepia => "sepia",
        Poster => "poster", Chalk => "chalk", Stencil => "stencil",
    }
}
choices! {
    /// Background.
    Backdrop {
        Plain => "plain", Beach => "beach", Forest => "forest", City => "city", Mountains => "mountains",
        Night => "night", Library => "library",
    }
}
choices! {
    /// Clothing.
    Clothing { Shirt => "shirt", Suit => "suit", Hoodie => "hoodie", Striped => "striped shirt", }
}
choices! {
    /// Held object.
    Held { Nothing => "nothing", Cup => "cup", Flower => "flower", Book => "book", }
}
choices! {
    /// Where the light comes from, or what colour it has.
    Lighting {
        Even => "even light", Left => "light from the left", Right => "light from the right",
        Dim => "dim light", Warm => "warm light", Cold => "cold light",
    }
}
choices! {
    /// How large the head is in the frame.
    Framing { Normal => "portrait", Far => "from afar", Close => "close up", }
}
choices! {
    /// Colour of the background, and of shirt and hat.
    Colour {
        Red => "red", Green => "green", Blue => "blue", Yellow => "yellow",
        White => "white", Black => "black", Purple => "purple", Orange => "orange",
    }
}

impl Style {
    /// The styles of [`Scene::draw`].
    pub const FIRST: &'static [Self] = &[Self::Photo, Self::Sketch, Self::Painting];
}

impl Identity {
    /// The hair style that the factor stands for.
    pub fn hair_style_kind(&self) -> HairStyle {
        weighted(self.hair_style, HairStyle::ALL, &[0.08, 0.26, 0.16, 0.20, 0.15, 0.15])
    }

    /// The hair colour that the factor stands for.
    pub fn hair_colour_kind(&self) -> HairColour {
        even(self.hair_colour, HairColour::ALL).0
    }

    /// Where the factor lies within its hair colour, in [0, 1): from dark to light.
    pub fn hair_shade(&self) -> f32 {
        even(self.hair_colour, HairColour::ALL).1
    }

    /// The eye colour that the factor stands for.
    pub fn eye_colour_kind(&self) -> EyeColour {
        even(self.eye_colour, EyeColour::ALL).0
    }

    /// The beard that the factor stands for.
    pub fn beard_kind(&self) -> Beard {
        weighted(self.beard, Beard::ALL, &[0.62, 0.12, 0.16, 0.10])
    }
}

/// A scene: everything that changes from image to image. Fields are public: `Scene { style: Style::Photo, ..scene }`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scene {
    /// Expression of the face.
    pub expression: Expression,
    /// Turn of the head in radians, negative to the left of the image, within ±0.4.
    pub yaw: f32,
    /// Glasses.
    pub glasses: Glasses,
    /// Hat.
    pub hat: Hat,
    /// Colour of the background.
    pub background: Colour,
    /// How the image is made.
    pub style: Style,
    /// Where the light comes from: -1 left, 1 right.
    pub light: f32,
    /// Place of the head in the frame, in half frames right and down.
    pub shift: [f32; 2],
    /// Size of the head in the frame, about 1.
    pub scale: f32,
    /// Colour of shirt and hat; never the background's.
    pub cloth: Colour,
    /// Exposure, a factor about 1.
    pub gain: f32,
    /// Standard deviation of the grain, on a scale where white is 1.
    pub noise: f32,
    /// Seed of the grain.
    pub grain: u64,
    /// Background; only a plain one has the colour `background`.
    #[serde(skip_serializing_if = "Backdrop::is_first")]
    pub backdrop: Backdrop,
    /// Clothing.
    #[serde(skip_serializing_if = "Clothing::is_first")]
    pub clothing: Clothing,
    /// Held object.
    #[serde(skip_serializing_if = "Held::is_first")]
    pub held: Held,
    /// Colour and place of the light.
    #[serde(skip_serializing_if = "Lighting::is_first")]
    pub lighting: Lighting,
}

impl Scene {
    /// How many classes [`Scene::classes`] has.
    pub const CLASSES: usize = 6;

    /// Size of the head in the aligned world, against that of the varied one, where no word names the framing.
    pub const NORMAL_SCALE: f32 = 0.9;

    /// Scene number `image` of a list that all people share.
    pub fn draw(seed: u64, image: u64) -> Self {
        Self::from_rng(&mut stream(seed, *b"scenes..", 0, image))
    }

    /// Scene number `image` of one person's own list.
    pub fn draw_for(person: &Person, image: u64) -> Self {
        Self::from_rng(&mut stream(person.seed, *b"picture.", person.number, image))
    }

    fn from_rng(rng: &mut ChaCha8Rng) -> Self {
        let expression = weighted(rng.random(), Expression::ALL, &[0.30, 0.35, 0.20, 0.15]);
        let yaw = 0.40 * signed(rng);
        let glasses = weighted(rng.random(), Glasses::ALL, &[0.72, 0.18, 0.10]);
        let hat = weighted(rng.random(), Hat::ALL, &[0.76, 0.14, 0.10]);
        let background = rng.random_range(0..Colour::ALL.len());
        let style = weighted(rng.random(), Style::FIRST, &[0.70, 0.15, 0.15]);
        let light = signed(rng);
        let shift = [0.05 * signed(rng), 0.04 * signed(rng)];
        let scale = 1.0 + 0.06 * signed(rng);
        let cloth = (background + rng.random_range(1..Colour::ALL.len())) % Colour::ALL.len();
        let gain = 0.99 + 0.07 * signed(rng);
        let noise = 0.010 * rng.random::<f32>();
        Self {
            expression,
            yaw,
            glasses,
            hat,
            background: Colour::ALL[background],
            style,
            light,
            shift,
            scale,
            cloth: Colour::ALL[cloth],
            gain,
            noise,
            grain: rng.random(),
            backdrop: Backdrop::Plain,
            clothing: Clothing::Shirt,
            held: Held::Nothing,
            lighting: Lighting::Even,
        }
    }

    /// Scene number `image` of one person's own list in the aligned world: the head is at one place, at one size, and
    /// nothing varies that [`describe`](crate::synthetic::describe) does not name.
    pub fn aligned_for(person: &Person, image: u64) -> Self {
        Self::aligned(&mut stream(person.seed, *b"aligned.", person.number, image))
    }

    /// Scene number `image` of a list that all people share, in the aligned world.
    pub fn aligned_shared(seed: u64, image: u64) -> Self {
        Self::aligned(&mut stream(seed, *b"shared..", 0, image))
    }

    fn aligned(rng: &mut ChaCha8Rng) -> Self {
        let expression = weighted(rng.random(), Expression::ALL, &[0.31, 0.27, 0.21, 0.21]);
        let turn = weighted(rng.random(), Facing::ALL, &[0.70, 0.15, 0.15]);
        let angle = 0.26 + 0.14 * rng.random::<f32>();
        let glasses = weighted(rng.random(), Glasses::ALL, &[0.74, 0.16, 0.10]);
        let hat = weighted(rng.random(), Hat::ALL, &[0.74, 0.13, 0.13]);
        let background = rng.random_range(0..Colour::ALL.len());
        let style = if rng.random_bool(0.5) { 0 } else { rng.random_range(1..Style::ALL.len()) };
        let backdrop = if rng.random_bool(0.6) { 0 } else { rng.random_range(1..Backdrop::ALL.len()) };
        let cloth = (background + rng.random_range(1..Colour::ALL.len())) % Colour::ALL.len();
        let clothing = weighted(rng.random(), Clothing::ALL, &[0.40, 0.20, 0.20, 0.20]);
        let held = weighted(rng.random(), Held::ALL, &[0.79, 0.07, 0.07, 0.07]);
        let lighting = weighted(rng.random(), Lighting::ALL, &[0.60, 0.10, 0.10, 0.07, 0.07, 0.06]);
        let framing = weighted(rng.random(), Framing::ALL, &[0.86, 0.07, 0.07]);
        Self {
            expression,
            yaw: match turn {
                Facing::Ahead => 0.0,
                Facing::Left => -angle,
                Facing::Right => angle,
            },
            glasses,
            hat,
            background: Colour::ALL[background],
            style: Style::ALL[style],
            light: match lighting {
                Lighting::Left => -0.9,
                Lighting::Right => 0.9,
                _ => 0.0,
            },
            // The shoulders and a hat have room.
            shift: [0.0, -0.06],
            scale: match framing {
                Framing::Normal => Self::NORMAL_SCALE,
                Framing::Far => 0.68,
                Framing::Close => 1.2,
            },
            cloth: Colour::ALL[cloth],
            gain: 1.0,
            noise: 0.0,
            grain: rng.random(),
            backdrop: Backdrop::ALL[backdrop],
            clothing,
            held,
            lighting,
        }
    }

    /// How large the head is in the frame.
    pub fn framing(&self) -> Framing {
        match self.scale {
            scale if scale < 0.8 => Framing::Far,
            scale if scale > 1.1 => Framing::Close,
            _ => Framing::Normal,
        }
    }

    /// The same scene as a photo, with a neutral face and nothing on nose or head.
    pub fn plain(self) -> Self {
        Self {
            expression: Expression::Neutral,
            glasses: Glasses::None,
            hat: Hat::None,
            style: Style::Photo,
            ..self
        }
    }

    /// Where the face looks; within 0.22 rad it is ahead.
    pub fn facing(&self) -> Facing {
        match self.yaw {
            yaw if yaw < -0.22 => Facing::Left,
            yaw if yaw > 0.22 => Facing::Right,
            _ => Facing::Ahead,
        }
    }

    /// Attributes of the scene as class numbers in the order of [`Scene::class_words`].
    pub fn classes(&self) -> [usize; Self::CLASSES] {
        [
            self.expression as usize,
            self.facing() as usize,
            self.glasses as usize,
            self.hat as usize,
            self.style as usize,
            self.background as usize,
        ]
    }

    /// Names of the attributes and of their classes.
    pub fn class_words() -> [(&'static str, &'static [&'static str]); Self::CLASSES] {
        [
            ("expression", Expression::WORDS),
            ("facing", Facing::WORDS),
            ("glasses", Glasses::WORDS),
            ("hat", Hat::WORDS),
            ("style", &Style::WORDS[..Style::FIRST.len()]),
            ("background", Colour::WORDS),
        ]
    }
}

/// The stream of random numbers for one purpose; streams with different keys are independent.
pub fn stream(seed: u64, purpose: [u8; 8], person: u64, image: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, part) in key.chunks_exact_mut(8).zip([seed, u64::from_le_bytes(purpose), person, image]) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

fn signed(rng: &mut ChaCha8Rng) -> f32 {
    2.0 * rng.random::<f32>() - 1.0
}

/// Cuts [0, 1) in equal parts: the choice that `factor` falls in, and where in it.
fn even<T: Copy>(factor: f32, choices: &[T]) -> (T, f32) {
    let scaled = factor.clamp(0.0, 1.0) * choices.len() as f32;
    let index = (scaled as usize).min(choices.len() - 1);
    (choices[index], scaled - index as f32)
}

/// Cuts [0, 1) in parts of the sizes `shares`, which sum to 1: the choice that `factor` falls in.
fn weighted<T: Copy>(factor: f32, choices: &[T], shares: &[f32]) -> T {
    let mut end = 0.0;
    for (choice, share) in choices.iter().zip(shares) {
        end += share;
        if factor < end {
            return *choice;
        }
    }
    choices[choices.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_fixed_by_seed_and_number() {
        assert_eq!(Person::new(3, 41), Person::new(3, 41));
        assert_ne!(Person::new(3, 41).identity, Person::new(3, 42).identity);
        assert_ne!(Person::new(3, 41).identity, Person::new(4, 41).identity);
    }

    #[test]
    fn factors_go_to_an_array_and_back() {
        let identity = Person::new(1, 1).identity;
        assert_eq!(Identity::from_array(identity.to_array()), identity);
        assert_eq!(Identity::NAMES[0], "skin");
        assert_eq!(identity.to_array()[27], identity.ear_size);
    }

    #[test]
    fn scenes_are_shared_by_seed_or_drawn_for_a_person() {
        assert_eq!(Scene::draw(5, 2), Scene::draw(5, 2));
        assert_ne!(Scene::draw(5, 2), Scene::draw(5, 3));
        let (one, two) = (Person::new(5, 1), Person::new(5, 2));
        assert_eq!(Scene::draw_for(&one, 9), Scene::draw_for(&one, 9));
        assert_ne!(Scene::draw_for(&one, 9), Scene::draw_for(&two, 9));
    }

    #[test]
    fn every_class_of_every_scene_attribute_occurs() {
        let words = Scene::class_words();
        let mut seen: Vec<Vec<bool>> = words.iter().map(|(_, names)| vec![false; names.len()]).collect();
        for image in 0..400 {
            let scene = Scene::draw(0, image);
            assert_ne!(scene.cloth, scene.background);
            for (attribute, class) in scene.classes().into_iter().enumerate() {
                seen[attribute][class] = true;
            }
        }
        assert!(seen.iter().flatten().all(|&class| class), "{seen:?}");
    }

    #[test]
    fn categories_take_the_factor_at_both_ends() {
        assert_eq!(even(0.0, HairColour::ALL), (HairColour::Black, 0.0));
        assert_eq!(even(1.0, HairColour::ALL), (HairColour::Grey, 1.0));
        assert_eq!(weighted(0.0, Beard::ALL, &[0.62, 0.12, 0.16, 0.10]), Beard::None);
        assert_eq!(weighted(1.0, Beard::ALL, &[0.62, 0.12, 0.16, 0.10]), Beard::Goatee);
    }
}
