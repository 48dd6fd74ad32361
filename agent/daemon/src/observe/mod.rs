//! What can be seen of a running agent: `status`.

pub(crate) mod status;
