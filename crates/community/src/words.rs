//! Closed lists.

/// A closed list as an enum with one word per value: the word of SQL, JSON and the command line.
#[macro_export]
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ::serde::Serialize, ::serde::Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)*
        }

        impl $name {
            /// All values, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// Its word.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)*
                }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = ::placement::UnknownName;

            fn from_str(text: &str) -> ::std::result::Result<Self, Self::Err> {
                $name::ALL.iter().copied().find(|v| v.name() == text).ok_or_else(|| ::placement::UnknownName(text.into()))
            }
        }
    };
}

/// Names a module's fenced statements in one place, so that a test can try them all.
#[macro_export]
#[doc(hidden)]
macro_rules! fenced_list {
    ($($name:ident)*) => {
        #[doc(hidden)]
        pub(crate) fn fenced() -> Vec<(&'static str, ::shards::AnyFenced)> {
            vec![$((concat!(module_path!(), "::", stringify!($name)), (&$name).into())),*]
        }
    };
}
