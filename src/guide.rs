//! Pages on the use of the crate; they hold no items.

#[doc = include_str!("guide/placement.md")]
pub mod placement {}

#[cfg(feature = "test-util")]
#[cfg_attr(docsrs, doc(cfg(feature = "test-util")))]
#[doc = include_str!("guide/testing.md")]
pub mod testing {}
