//! Types of the network that cannot hold an illegal value.

mod if_name;
mod mac;
mod netns_url;
mod peer_url;
mod vni;

pub use if_name::{IfName, IfNameError};
pub use mac::{MacAddr, MacAddrError};
pub use netns_url::{NetnsUrl, NetnsUrlError};
pub use peer_url::{PeerPlace, PeerUrl, PeerUrlError};
pub use vni::{Vni, VniError};
