//! Which signal asks a container to stop: the container's, else the image's, else SIGTERM.

use catamaran_cri_api::v1::{ContainerConfig, Signal};
use oci_spec::image::ImageConfiguration;

use crate::error::{Result, SpecError};

/// A signal of Linux on x86-64 and arm64, signal(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSignal {
    /// Its number, 1 to 64.
    pub number: u32,
    /// The same as CRI reports it in ContainerStatus.
    pub cri: Signal,
}

/// glibc's SIGRTMIN; 32 and 33 are its own.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

const NAMES: [(&str, u32); 37] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
    ("RTMIN", RTMIN),
    ("RTMAX", RTMAX),
];

/// The signal with which StopContainer begins.
///
/// # Errors
/// An unknown number in `stop_signal`, an unknown name in the image's StopSignal.
pub fn stop_signal(container: &ContainerConfig, image: &ImageConfiguration) -> Result<StopSignal> {
    let cri = Signal::try_from(container.stop_signal)
        .map_err(|unknown| SpecError::invalid("stop_signal", format!("unknown value {}", unknown.0)))?;
    if cri != Signal::RuntimeDefault {
        let number = parse(cri.as_str_name());
        // Every name of the enum parses; a test holds it.
        return number.map_or_else(
            || Err(SpecError::unimplemented("stop_signal", cri.as_str_name())),
            |number| Ok(StopSignal { number, cri }),
        );
    }
    let named = image
        .config()
        .as_ref()
        .and_then(|config| config.stop_signal().as_deref())
        .unwrap_or("");
    if named.is_empty() {
        return Ok(StopSignal {
            number: 15,
            cri: Signal::Sigterm,
        });
    }
    let number = parse(named)
        .ok_or_else(|| SpecError::invalid("image config.StopSignal", format!("unknown signal {named:?}")))?;
    Ok(StopSignal {
        number,
        cri: cri_name(number),
    })
}

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-2` and CRI's `SIGRTMINPLUS3`, `SIGRTMAXMINUS2`.
fn parse(text: &str) -> Option<u32> {
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |prefixes: [&str; 2]| {
        let digits = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix))?;
        digits
            .parse::<u32>()
            .ok()
            .filter(|offset| *offset <= RTMAX - RTMIN)
    };
    if let Some(above) = offset(["RTMIN+", "RTMINPLUS"]) {
        return Some(RTMIN + above);
    }
    offset(["RTMAX-", "RTMAXMINUS"]).map(|below| RTMAX - below)
}

/// The enum's name for a number. 32 and 33 have none; they are reported as the default.
fn cri_name(number: u32) -> Signal {
    let name = match number {
        RTMIN => "SIGRTMIN".to_owned(),
        RTMAX => "SIGRTMAX".to_owned(),
        35..=49 => format!("SIGRTMINPLUS{}", number - RTMIN),
        50..=63 => format!("SIGRTMAXMINUS{}", RTMAX - number),
        _ => NAMES
            .iter()
            .find(|(_, n)| *n == number)
            .map_or(String::new(), |(name, _)| format!("SIG{name}")),
    };
    Signal::from_str_name(&name).unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder, RootFsBuilder};

    fn image(stop: &str) -> ImageConfiguration {
        let config = ConfigBuilder::default()
            .stop_signal(stop)
            .build()
            .expect("config");
        let rootfs = RootFsBuilder::default()
            .typ("layers")
            .diff_ids(Vec::<String>::new())
            .build()
            .expect("rootfs");
        ImageConfigurationBuilder::default()
            .architecture("amd64")
            .os("linux")
            .config(config)
            .rootfs(rootfs)
            .build()
            .expect("image")
    }

    #[test]
    fn every_signal_of_the_cri() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).expect("the enum has 1 to 65");
            let config = ContainerConfig {
                stop_signal: value,
                ..Default::default()
            };
            let found = stop_signal(&config, &image("")).expect("every name parses");
            assert!((1..=64).contains(&found.number), "{}", signal.as_str_name());
            // And back, but for the aliases.
            if !["SIGIOT", "SIGCLD", "SIGPOLL"].contains(&signal.as_str_name()) {
                assert_eq!(cri_name(found.number), signal);
            }
        }
    }

    #[test]
    fn the_image_s_signal() {
        for (text, number) in [
            ("SIGQUIT", 3),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-2", 62),
            ("RTMIN", 34),
            ("", 15),
            ("SIGRTMIN+30", 64),
        ] {
            let found = stop_signal(&ContainerConfig::default(), &image(text)).expect(text);
            assert_eq!(found.number, number, "{text}");
        }
        for text in ["SIGNOTHING", "0", "65", "RTMIN+31", "RTMAX-99", "SIG", "-3"] {
            let error = stop_signal(&ContainerConfig::default(), &image(text)).expect_err(text);
            assert_eq!(error.field, "image config.StopSignal");
        }
        let config = ContainerConfig {
            stop_signal: Signal::Sigint.into(),
            ..Default::default()
        };
        assert_eq!(
            stop_signal(&config, &image("SIGQUIT")).map(|signal| signal.number),
            Ok(2)
        );
        assert!(
            stop_signal(
                &ContainerConfig {
                    stop_signal: 99,
                    ..Default::default()
                },
                &image("")
            )
            .is_err()
        );
    }
}
