//! StartContainer: lets the waiting process run.

use crate::error::Result;
use crate::shim::Shim;
use crate::store::Written;

/// Returns the process id.
pub(super) async fn run(shim: Shim, container: String, announced: Written) -> Result<u32> {
    announced.durable().await?;
    Ok(shim.start(&container).await?)
}
