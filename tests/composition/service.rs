//! Of services: whether they are `Clone`, as the layer wants the one below it, and when they are ready.

use std::marker::PhantomData;

use http::Request;
use tower::{Service, ServiceExt};

/// Asks at compile time: an inherent constant, which is there if the type is `Clone`, goes before the trait's.
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
        use crate::service::Otherwise as _;
        crate::service::Probe::<$type>::IS_CLONE
    }};
}

pub(crate) use is_clone;

/// Waits until a service is ready.
pub async fn ready<S: Service<Request<String>>>(service: &mut S) -> Result<&mut S, S::Error> {
    service.ready().await
}
