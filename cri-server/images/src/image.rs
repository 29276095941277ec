//! What callers see of an image.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::metadata::ImageRecord;

/// An image that is complete on this node.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the configuration, `sha256:…` (the CRI's image id).
    pub id: String,
    /// Tags, normalised (`docker.io/library/busybox:latest`), sorted.
    pub repo_tags: Vec<String>,
    /// `repository@digest` of what was pulled (the index's digest where there is one), sorted.
    pub repo_digests: Vec<String>,
    /// Bytes on disk; layers shared with other images count in each.
    pub size: u64,
    /// One of its references is configured as pinned.
    pub pinned: bool,
    /// The OCI configuration: user, environment, entry point, command, working directory, labels, stop signal.
    pub config: oci_spec::image::ImageConfiguration,
    /// Chain ids of the layers, the lowest first.
    pub layers: Vec<String>,
    /// When the image was built according to its configuration, nanoseconds since the epoch.
    pub created_ns: Option<i64>,
}

impl Image {
    pub(crate) fn new(
        id: &str,
        record: &ImageRecord,
        config: &[u8],
        layer_bytes: u64,
        pinned: &[String],
    ) -> Result<Self> {
        let config = parse_config(config)?;
        Ok(Self {
            id: id.to_owned(),
            created_ns: config.created().as_deref().and_then(parse_rfc3339),
            pinned: record
                .tags
                .iter()
                .chain(&record.digests)
                .any(|name| pinned.contains(name)),
            repo_tags: record.tags.iter().cloned().collect(),
            repo_digests: record.digests.iter().cloned().collect(),
            size: layer_bytes + record.content.values().sum::<u64>(),
            config,
            layers: record.layers.clone(),
        })
    }
}

/// Parses an image configuration.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<oci_spec::image::ImageConfiguration> {
    serde_json::from_slice(bytes).map_err(|error| Error::malformed("image configuration", error))
}

/// The diff ids of a configuration.
pub(crate) fn diff_ids(config: &oci_spec::image::ImageConfiguration) -> Result<Vec<Digest>> {
    let parse = |text: &String| {
        Digest::parse(text).ok_or_else(|| {
            Error::Hostile(format!(
                "diff id {:?}",
                text.chars().take(100).collect::<String>()
            ))
        })
    };
    config.rootfs().diff_ids().iter().map(parse).collect()
}

/// Nanoseconds since the epoch of a RFC 3339 time; `None` for anything else.
fn parse_rfc3339(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok();
    let punctuation = [(4, '-'), (7, '-'), (10, 'T'), (13, ':'), (16, ':')];
    if !text.is_ascii()
        || punctuation
            .iter()
            .any(|(at, c)| text.chars().nth(*at) != Some(*c))
    {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let rest = &text[19..];
    let digits = rest
        .strip_prefix('.')
        .map_or(0, |rest| rest.bytes().take_while(u8::is_ascii_digit).count());
    let (fraction, zone) = if digits > 0 {
        rest[1..].split_at(digits)
    } else {
        ("", rest)
    };
    let nanos: i64 = fraction
        .chars()
        .chain(std::iter::repeat('0'))
        .take(9)
        .collect::<String>()
        .parse()
        .ok()?;
    let offset = match zone.split_at_checked(1)? {
        ("Z", "") => 0,
        (sign @ ("+" | "-"), rest) => {
            let (hours, minutes) = rest.split_once(':')?;
            let two_digits = |text: &str| text.parse::<i64>().ok().filter(|_| text.len() == 2);
            let seconds = two_digits(hours)? * 3600 + two_digits(minutes)? * 60;
            if sign == "+" { seconds } else { -seconds }
        }
        _ => return None,
    };
    // Days since the epoch in the proleptic Gregorian calendar, years beginning in March.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day
        - 1
        - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed() {
        assert_eq!(parse_rfc3339("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(
            parse_rfc3339("2000-02-29T12:30:15.5Z"),
            Some(951_827_415_500_000_000)
        );
        assert_eq!(
            parse_rfc3339("2000-02-29T13:30:15.5+01:00"),
            Some(951_827_415_500_000_000)
        );
        for bad in [
            "",
            "2000",
            "2000-01-01",
            "2000-01-01T00:00:00",
            "2000-01-01T00:00:00X",
            "0001-01-01T00:00:00Z",
            "2000-01-01T00:00:00+9223372036854775807:00",
        ] {
            assert_eq!(parse_rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn dockers_configuration_is_taken() {
        let text = br#"{"architecture":"amd64","os":"linux","config":{"User":"","Env":["A=b"],"Cmd":null,
            "Entrypoint":["/x"],"Volumes":{"/data":{}},"Healthcheck":{"Test":["NONE"]},"ArgsEscaped":true,
            "WorkingDir":"","Labels":null,"StopSignal":"SIGQUIT","OnBuild":null,"ExposedPorts":{"80/tcp":{}}},
            "rootfs":{"type":"layers","diff_ids":[]},"history":[{"created":"2020-01-01T00:00:00Z"}],
            "container_config":{"Hostname":"x"},"docker_version":"20"}"#;
        let config = parse_config(text).unwrap();
        let inner = config.config().as_ref().unwrap();
        assert_eq!(inner.entrypoint().as_deref(), Some(&["/x".to_owned()][..]));
        assert_eq!(inner.stop_signal().as_deref(), Some("SIGQUIT"));
        assert_eq!(inner.volumes().as_deref(), Some(&["/data".to_owned()][..]));
        assert!(diff_ids(&config).unwrap().is_empty());
    }
}
