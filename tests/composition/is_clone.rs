//! Whether services are `Clone`, as the layer wants the one below it.

use std::marker::PhantomData;

/// Tells at compile time: a `Clone` type has an inherent constant, which wins over the trait's.
pub struct Probe<T>(PhantomData<T>);

impl<T: Clone> Probe<T> {
    pub const IS_CLONE: bool = true;
}

pub trait Otherwise {
    const IS_CLONE: bool = false;
}

impl<T> Otherwise for Probe<T> {}

macro_rules! is_clone {
    ($type:ty) => {{
        #[allow(unused_imports, reason = "used by those that are not `Clone`")]
        use crate::is_clone::Otherwise as _;
        crate::is_clone::Probe::<$type>::IS_CLONE
    }};
}

pub(crate) use is_clone;
