//! The kernel mechanism: an interface in a pod's network namespace.

use super::{
    MechanismError,
    parameters::{INODE_URL, NAME, Parameters, set, value},
};
use crate::net::{IfName, NetnsUrl};

/// A kernel interface's parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The interface's name in the pod.
    pub name: Option<IfName>,
    /// The pod's network namespace.
    pub netns: Option<NetnsUrl>,
}

impl Kernel {
    /// Reads the parameters.
    ///
    /// # Errors
    /// A value that cannot be used, with its key.
    pub fn parse(params: &Parameters) -> Result<Self, MechanismError> {
        Ok(Self {
            name: value(params, NAME).map(str::parse).transpose()?,
            netns: value(params, INODE_URL).map(str::parse).transpose()?,
        })
    }

    /// Writes the parameters and leaves all others alone. What is absent is removed.
    pub fn write(&self, params: &mut Parameters) {
        set(params, NAME, self.name.as_ref());
        set(params, INODE_URL, self.netns.as_ref());
    }
}
