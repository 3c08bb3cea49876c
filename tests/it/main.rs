//! The behaviour of the crate, one module for each, through the public API only.

mod token_endpoint;
