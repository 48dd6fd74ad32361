//! Types of the network that cannot hold an illegal value, and special address ranges.

mod if_name;
mod mac;
mod netns_url;
mod peer_url;
pub mod special;
mod vni;

pub use if_name::{IfName, IfNameError};
pub use mac::{MacAddr, MacAddrError};
pub use netns_url::{NetnsUrl, NetnsUrlError};
pub use peer_url::{PeerPlace, PeerUrl, PeerUrlError};
pub use vni::{Vni, VniError};
