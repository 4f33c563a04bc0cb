//! Enums whose values have a name, for the command line, settings and reports.

/// An enum whose values have a name each; made by the macro `named!`.
pub trait Named: Copy + Sized + 'static {
    /// All values, in the order of help texts.
    const ALL: &'static [Self];

    /// Its name.
    fn name(self) -> &'static str;

    /// What it stands for: its documentation, without the full stop.
    fn about(self) -> &'static str;

    /// Other names by which it is read.
    fn aliases(self) -> &'static [&'static str];

    /// The value of this name.
    fn from_name(name: &str) -> Option<Self> {
        let has_name = |value: &Self| value.name() == name || value.aliases().contains(&name);
        Self::ALL.iter().copied().find(has_name)
    }
}

/// Declares an enum that is [`Named`]: each variant is followed by `= "name"`, and by `| "alias"` for other names.
macro_rules! named {
    (
        $(#[$meta:meta])*
        $vis:vis enum $type:ident {
            $(
                $(#[doc = $about:literal])+
                $(#[default $($default:tt)*])?
                $(#[serde($($serde:tt)*)])*
                $variant:ident = $name:literal $(| $alias:literal)*,
            )+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $type {
            $(
                $(#[doc = $about])+
                $(#[default $($default)*])?
                $(#[serde($($serde)*)])*
                $variant,
            )+
        }

        impl $crate::named::Named for $type {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            fn about(self) -> &'static str {
                let about = match self {
                    $(Self::$variant => concat!($($about),+),)+
                };
                about.trim().trim_end_matches('.')
            }

            fn aliases(self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant => &[$($alias),*],)+
                }
            }
        }
    };
}
pub(crate) use named;

#[cfg(test)]
mod tests {
    use super::*;

    named! {
        /// A size.
        #[derive(Default)]
        enum Size {
            /// Not large,
            /// e.g. a mouse.
            Small = "small",
            /// Large
            #[default]
            Large = "extra-large" | "xl",
        }
    }

    #[test]
    fn names_and_documentation_are_those_of_the_variants() {
        assert_eq!(Size::ALL.iter().map(|size| size.name()).collect::<Vec<_>>(), ["small", "extra-large"]);
        assert_eq!(Size::Small.about(), "Not large, e.g. a mouse");
        assert_eq!(Size::default(), Size::Large);
        assert_eq!((Size::from_name("xl"), Size::from_name("Small")), (Some(Size::Large), None));
    }
}
