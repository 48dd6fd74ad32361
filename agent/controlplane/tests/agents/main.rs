//! Whole agents talking NSM v1 to each other, to clients, to endpoints and to peers that do wrong.
//!
//! Every scenario compares what is held on all sides before and after: connections, VNIs, monitor
//! streams, links in the kernels, registry entries, and the endpoints' own connections.

mod admission;
mod bad_link;
mod bounds;
mod claims;
mod context;
mod deputy;
mod finding;
mod flow;
mod health;
mod hostile;
mod late_prober;
mod lifetime;
mod lost_hop;
mod many;
mod meanwhile;
mod monitor;
mod node;
mod nsmgr;
mod owners;
mod proven;
mod reaching;
mod reasons;
mod refresh;
mod refused;
mod relay;
mod reselect;
mod selection;
mod support;
mod told;
mod topology;
