//! Page tables over a vector, edited while a simulated CPU uses them.

mod machine;
mod model;
mod promises;
