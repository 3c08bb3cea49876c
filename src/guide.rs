//! Pages on the use of the crate; they hold no items.

#[doc = include_str!("guide/placement.md")]
pub mod placement {}
