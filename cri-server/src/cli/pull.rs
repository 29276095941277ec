//! `catamaran pull`: an image, through the server, with the node's own credentials.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::{Outcome, block_on, connect};
use crate::config::Config;
use crate::cri::api;

pub(super) fn run(config: &Config, reference: &str) -> Outcome {
    block_on(pull(config, reference))?
}

async fn pull(config: &Config, reference: &str) -> Outcome {
    let mut client = api::image_service_client::ImageServiceClient::new(connect(config).await?);
    let image = api::ImageSpec {
        image: reference.to_owned(),
        ..Default::default()
    };
    let begun = Instant::now();
    let request = api::PullImageRequest {
        image: Some(image),
        ..Default::default()
    };
    let pulled = client.pull_image(request);
    tokio::pin!(pulled);
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    tick.tick().await;
    let answer = loop {
        tokio::select! {
            answer = &mut pulled => break answer,
            _ = tick.tick() => eprintln!("pulling {reference}: {} s", begun.elapsed().as_secs()),
        }
    };
    let answer = answer.map_err(|status| format!("{}: {}", status.code(), status.message()))?;
    println!("{}", answer.into_inner().image_ref);
    Ok(ExitCode::SUCCESS)
}
