//! Generates the Stream service of `proto/stream.proto` for ttrpc.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/stream.proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/stream.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generated files are included into modules, where inner attributes and inner docs may not stand.
    for name in ["stream.rs", "stream_ttrpc.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path)?;
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .collect();
        std::fs::write(&path, kept.join("\n"))?;
    }
    Ok(())
}
