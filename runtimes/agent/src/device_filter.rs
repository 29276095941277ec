//! Device access of a container under cgroup v2, which has no controller files for it: an eBPF program made
//! from the spec's rules and attached to the container's cgroup (kernel Documentation, "cgroup-v2", Device
//! controller). Version 1 has the `devices` controller, which libcgroups fills.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Context, Error, Result};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// What every container may use, as runc has it: making any node, and the harmless devices of `/dev`.
const DEFAULTS: [(Option<u32>, Option<u32>, u32); 9] = [
    (None, None, MKNOD),
    (Some(1), Some(3), ALL),
    (Some(1), Some(5), ALL),
    (Some(1), Some(7), ALL),
    (Some(1), Some(8), ALL),
    (Some(1), Some(9), ALL),
    (Some(5), Some(0), ALL),
    (Some(5), Some(2), ALL),
    (Some(136), None, ALL),
];

/// Attaches the rules to a cgroup's directory. The last rule that matches decides; none: no access.
pub(crate) fn attach(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = with_defaults(rules)?;
    let program = load(&assemble(&rules)).context(|| "cannot load the device filter".into())?;
    let directory = File::open(cgroup).context(|| format!("cannot open {}", cgroup.display()))?;
    let attributes = AttachAttributes {
        target_fd: directory.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes are those of BPF_PROG_ATTACH and outlive the call.
    unsafe { bpf(BPF_PROG_ATTACH, &attributes) }
        .map(drop)
        .context(|| format!("cannot attach the device filter to {}", cgroup.display()))
}

fn with_defaults(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut all = rules.iter().map(rule).collect::<Result<Vec<_>>>()?;
    all.extend(DEFAULTS.map(|(major, minor, access)| Rule {
        allow: true,
        kind: Some(CHARACTER),
        major,
        minor,
        access,
    }));
    all.push(Rule {
        allow: true,
        kind: Some(BLOCK),
        major: None,
        minor: None,
        access: MKNOD,
    });
    Ok(all)
}

fn rule(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |value: Option<i64>, field: &str| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| {
            Error::Invalid(format!(
                "linux.resources.devices: {field} {value} is no device number"
            ))
        }),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => {
                return Err(Error::Invalid(format!(
                    "linux.resources.devices: access {other:?} is not r, w or m"
                )));
            }
        };
    }
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => {
            return Err(Error::Invalid(
                "linux.resources.devices: a FIFO has no device rules".into(),
            ));
        }
    };
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major(), "major")?,
        minor: number(rule.minor(), "minor")?,
        access,
    })
}

/// struct bpf_insn.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high four.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Codes of the instructions used (kernel Documentation, "eBPF Instruction Set").
const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const AND32_IMM: u8 = 0x54;
const RSH32_IMM: u8 = 0x74;
const MOV32_IMM: u8 = 0xb4;
const MOV32_REG: u8 = 0xbc;
const JNE_IMM: u8 = 0x55;
const JNE_REG: u8 = 0x5d;
const JEQ_IMM: u8 = 0x15;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const SCRATCH: u8 = 1; // the context at entry
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        immediate: immediate.cast_signed(),
    }
}

/// The program: struct bpf_cgroup_dev_ctx { access_type, major, minor } in, 1 (allowed) or 0 out.
fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, SCRATCH, 0, 0),
        instruction(MOV32_REG, ACCESS, KIND, 0, 0),
        instruction(AND32_IMM, KIND, 0, 0, 0xffff),
        instruction(RSH32_IMM, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        instruction(LOAD_WORD, MINOR, SCRATCH, 8, 0),
    ];
    // The last rule decides, so the first check is of the last rule; each block jumps to the next where its
    // rule does not match.
    for rule in rules.iter().rev() {
        let mut block = Vec::new();
        if rule.access != ALL {
            block.push(instruction(MOV32_REG, SCRATCH, ACCESS, 0, 0));
            block.push(instruction(AND32_IMM, SCRATCH, 0, 0, rule.access));
            if rule.allow {
                // Every access asked for must be in the rule.
                block.push(instruction(JNE_REG, SCRATCH, ACCESS, 0, 0));
            } else {
                // Any access in the rule is refused.
                block.push(instruction(JEQ_IMM, SCRATCH, 0, 0, 0));
            }
        }
        for (register, value) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(value) = value {
                block.push(instruction(JNE_IMM, register, 0, 0, value));
            }
        }
        block.push(instruction(MOV32_IMM, RESULT, 0, 0, u32::from(rule.allow)));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        let length = block.len();
        // A rule for everything: what comes before it in the list never decides, and the verifier refuses
        // instructions that are never reached.
        if length == 2 {
            program.extend(block);
            return program;
        }
        for (at, step) in block.iter_mut().enumerate() {
            if matches!(step.code, JNE_IMM | JNE_REG | JEQ_IMM) {
                step.offset = i16::try_from(length - at - 1).unwrap_or(i16::MAX);
            }
        }
        program.extend(block);
    }
    program.push(instruction(MOV32_IMM, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

/// More signals than ever arrive in a row.
const LOAD_TRIES: u32 = 100;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Beginning of union bpf_attr for BPF_PROG_LOAD; the kernel takes the rest as zero.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// Beginning of union bpf_attr for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn load(program: &[Instruction]) -> std::io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(std::io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // The verifier gives up when a signal is pending, SIGCHLD for instance, which is handled by then.
    let mut tries = 0;
    let fd = loop {
        tries += 1;
        // SAFETY: the attributes are those of BPF_PROG_LOAD; program and license outlive the call.
        match unsafe { bpf(BPF_PROG_LOAD, &attributes) } {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && tries < LOAD_TRIES => {}
            result => break result?,
        }
    };
    // SAFETY: the kernel returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attributes` must be what `command` expects, with valid pointers.
unsafe fn bpf<A>(command: libc::c_long, attributes: &A) -> std::io::Result<i32> {
    // SAFETY: the caller's promise; the kernel reads exactly size_of::<A>() bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            std::mem::size_of::<A>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(std::io::Error::last_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn allowed(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let immediate = immediate.cast_unsigned();
            at += 1;
            let jump = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset).unwrap() / 4];
                    false
                }
                AND32_IMM => {
                    registers[to] &= immediate;
                    false
                }
                RSH32_IMM => {
                    registers[to] >>= immediate;
                    false
                }
                MOV32_IMM => {
                    registers[to] = immediate;
                    false
                }
                MOV32_REG => {
                    registers[to] = registers[from];
                    false
                }
                JNE_IMM => registers[to] != immediate,
                JNE_REG => registers[to] != registers[from],
                JEQ_IMM => registers[to] == immediate,
                EXIT => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            };
            if jump {
                at += usize::try_from(offset).unwrap();
            }
        }
    }

    fn rules(json: &str) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        assemble(&with_defaults(&rules).unwrap())
    }

    #[test]
    fn an_ordinary_container_gets_the_harmless_devices_only() {
        let program = rules(r#"[{"allow":false,"access":"rwm"}]"#);
        assert!(allowed(&program, CHARACTER, READ | WRITE, 1, 3), "null");
        assert!(allowed(&program, CHARACTER, READ, 136, 7), "a terminal");
        assert!(allowed(&program, BLOCK, MKNOD, 253, 0), "mknod");
        assert!(!allowed(&program, BLOCK, READ, 253, 0), "a disk");
        assert!(!allowed(&program, CHARACTER, MKNOD | READ, 1, 1), "mem");
        assert!(!allowed(&program, CHARACTER, READ, 10, 200), "tun");
    }

    #[test]
    fn a_later_rule_overrides_an_earlier_one_for_its_access_only() {
        let program = rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":1,"access":"rw"},
                {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
        );
        assert!(allowed(&program, BLOCK, READ, 8, 1));
        assert!(!allowed(&program, BLOCK, READ | WRITE, 8, 1));
        assert!(!allowed(&program, BLOCK, READ, 8, 2));
    }

    #[test]
    fn a_privileged_container_gets_everything() {
        let program = rules(r#"[{"allow":true,"access":"rwm"}]"#);
        assert!(allowed(&program, BLOCK, ALL, 8, 0));
        assert!(allowed(&program, CHARACTER, ALL, 10, 200));
    }

    #[test]
    fn a_wrong_access_is_refused() {
        let rules: Vec<LinuxDeviceCgroup> =
            serde_json::from_str(r#"[{"allow":true,"access":"rx"}]"#).unwrap();
        assert!(with_defaults(&rules).is_err());
    }

    #[test]
    fn the_kernel_takes_the_program() {
        // Loading needs CAP_BPF; the verifier is what is tested here.
        match load(&rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"access":"r"}]"#,
        )) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: the_kernel_takes_the_program: no permission to load eBPF programs");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
