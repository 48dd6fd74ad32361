//! Generates the wire types from `protos/` with protox, so that no protoc is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: [&str; 5] = [
    "admin.proto",
    "connection.proto",
    "connectioncontext.proto",
    "networkservice.proto",
    "registry.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos");
    let descriptors = protox::compile(PROTOS, ["protos"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Apart: reflection names what an agent serves, and it serves no Workload API.
    let workload = protox::compile(["workload.proto"], ["protos"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .codec_path("crate::codec::SliceCodec")
        .compile_fds(workload)?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Equal inputs give equal bytes: maps are compared and printed in tests and in `--json`.
        .btree_map(".")
        .codec_path("crate::codec::SliceCodec")
        .type_attribute(".proxynsmgr.admin", "#[derive(serde::Serialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}
