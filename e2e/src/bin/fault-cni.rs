//! A CNI plugin that passes on what the plugins before it made, until the test says otherwise.
//! Its configuration's key `control` is a directory as in [`catamaran_e2e::failpoint`].

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use catamaran_e2e::failpoint::{self, Action};
use serde_json::{Value, json};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            println!(
                "{}",
                json!({"cniVersion": "1.0.0", "code": 999, "msg": format!("fault-cni: {error:#}")})
            );
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let verb = std::env::var("CNI_COMMAND").context("CNI_COMMAND is not set")?;
    if verb == "VERSION" {
        println!(
            "{}",
            json!({"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]})
        );
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let config: Value = serde_json::from_str(&text)?;
    let control = config["control"].as_str().context("the key control is missing")?;
    let action = failpoint::next(Path::new(control), &verb)?;
    if action == Action::Slow {
        std::thread::sleep(failpoint::SLOW);
    }
    match action {
        Action::Hang => failpoint::hang(),
        Action::Garbage => println!("this is no JSON"),
        Action::Fail | Action::FailAfter | Action::Stand => {
            let error = json!({
                "cniVersion": "1.0.0", "code": 103, "msg": "scripted fault", "details": "as the test asked for",
            });
            println!("{error}");
            return Ok(ExitCode::FAILURE);
        }
        Action::Pass | Action::Slow if verb == "ADD" => println!("{}", config["prevResult"]),
        Action::Pass | Action::Slow => {}
    }
    Ok(ExitCode::SUCCESS)
}
