//! The table of targets, and the targets by where their bytes come from.

mod dns;
mod files;
mod identity;
mod metadata;
mod names;
mod nsm;
mod packets;
mod tokens;

use crate::Target;

/// Every target.
pub const ALL: &[Target] = &[
    target("claims", identity::claims),
    target("configuration", files::configuration),
    target("context", nsm::context),
    target("dns", dns::answer),
    target("excluded_prefixes", files::excluded_prefixes),
    target("frame", packets::frame),
    target("grpc", nsm::grpc),
    target("ip_map", files::ip_map),
    target("metadata", metadata::answer),
    target("name", names::text),
    target("policy", files::policy),
    target("registry", nsm::registry),
    target("registry_path", tokens::registry_path),
    target("request", nsm::request),
    target("sbfd", packets::sbfd),
    target("spiffe_id", identity::spiffe_id),
    target("stun", packets::stun),
    target("token", tokens::token),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// The bytes as text, where they are text.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// A first byte that chooses between parsers, and the rest.
fn choice(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((*first, rest))
}
