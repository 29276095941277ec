//! The outcome of a command as clients read it: a Kubernetes `meta/v1` Status in JSON from the fourth version
//! of the remote command protocol on, before that a text for failures and nothing for success.

use serde::Serialize;

use crate::backend::BackendError;

/// Outcome of a remote command.
#[derive(Debug)]
pub(crate) enum Outcome {
    Exited(i32),
    Failed(BackendError),
}

#[derive(Serialize)]
struct Status {
    metadata: Metadata,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Metadata {}

#[derive(Serialize)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Serialize)]
struct Cause {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    message: String,
}

impl Outcome {
    fn text(&self) -> Option<String> {
        match self {
            Outcome::Exited(0) => None,
            Outcome::Exited(code) => Some(format!("command terminated with non-zero exit code: {code}")),
            Outcome::Failed(error) => Some(error.to_string()),
        }
    }

    /// What is written to the error stream.
    pub(crate) fn message(&self, json: bool) -> Vec<u8> {
        if !json {
            return self.text().unwrap_or_default().into_bytes();
        }
        let cause = |reason, message| {
            Some(Details {
                causes: vec![Cause { reason, message }],
            })
        };
        let success = Status {
            metadata: Metadata {},
            status: "Success",
            message: None,
            reason: None,
            details: None,
            code: None,
        };
        let status = match self {
            Outcome::Exited(0) => success,
            Outcome::Exited(code) => Status {
                status: "Failure",
                message: self.text(),
                reason: Some("NonZeroExitCode"),
                details: cause(Some("ExitCode"), code.to_string()),
                ..success
            },
            Outcome::Failed(error) => Status {
                status: "Failure",
                message: Some(format!("Internal error occurred: {error}")),
                reason: Some("InternalError"),
                details: cause(None, error.to_string()),
                code: Some(500),
                ..success
            },
        };
        serde_json::to_vec(&status).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_go_clients_read_it() {
        let json = |outcome: Outcome| String::from_utf8(outcome.message(true)).expect("text");
        assert_eq!(json(Outcome::Exited(0)), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(
            json(Outcome::Exited(3)),
            r#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
        );
        let failed = json(Outcome::Failed(BackendError::new("no such container")));
        assert!(failed.contains(r#""reason":"InternalError""#) && failed.contains("no such container"));
        assert_eq!(Outcome::Exited(0).message(false), b"");
        assert_eq!(Outcome::Failed(BackendError::new("x")).message(false), b"x");
    }
}
