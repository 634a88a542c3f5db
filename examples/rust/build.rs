//! Makes the stubs from the contract in one file, which `make stubs` writes: so no protoc is needed.

use prost::Message;
use tonic_prost_build::FileDescriptorSet;

const CONTRACT: &str = "../../stubs/parley.binpb";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={CONTRACT}");
    let contract = std::fs::read(CONTRACT)
        .map_err(|error| format!("{CONTRACT}: {error}; run `make stubs`"))?;
    let protos = FileDescriptorSet::decode(contract.as_slice())?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(protos)?;
    Ok(())
}
