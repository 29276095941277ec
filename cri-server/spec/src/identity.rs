//! uid, gid and groups of a container's process, from the security context, the image's USER and the image's
//! `/etc/passwd` and `/etc/group`, passwd(5) and group(5).

use catamaran_cri_api::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use crate::error::{Result, SpecError};
use crate::input::ImageUsers;

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All groups, ascending; the primary one among them, so that dropping it with setgroups is visible
    /// (CVE-2022-36109).
    pub groups: Vec<u32>,
}

const RUN_AS_USER: &str = "linux.security_context.run_as_user";
const RUN_AS_GROUP: &str = "linux.security_context.run_as_group";
const RUN_AS_USERNAME: &str = "linux.security_context.run_as_username";
const SUPPLEMENTAL_GROUPS: &str = "linux.security_context.supplemental_groups";
const IMAGE_USER: &str = "image config.User";

/// Largest id: -1 as an unsigned id means "leave it as it is" to the kernel, and larger than 2^31-1 is refused
/// by other runtimes.
const MAX_ID: i64 = i32::MAX as i64;

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: Vec<&'a str>,
}

/// Resolves who the container runs as: `run_as_username` before `run_as_user` before the image's USER before
/// root. `run_as_group` needs one of the first two; without it the group is that of the user's passwd entry, or
/// 0 where there is none.
///
/// # Errors
/// A name that the image does not have, a negative id, `run_as_group` alone.
pub fn resolve_identity(
    security: Option<&LinuxContainerSecurityContext>,
    image_user: &str,
    users: &ImageUsers,
) -> Result<Identity> {
    let username = security.map_or("", |security| security.run_as_username.as_str());
    let run_as_user = security
        .and_then(|security| security.run_as_user.as_ref())
        .map(|value| value.value);
    let run_as_group = security
        .and_then(|security| security.run_as_group.as_ref())
        .map(|value| value.value);

    let (user, user_field, group, group_field) = if !username.is_empty() {
        if username.contains(':') {
            return Err(SpecError::invalid(
                RUN_AS_USERNAME,
                format!("{username:?} is not a user name"),
            ));
        }
        (username.to_owned(), RUN_AS_USERNAME, String::new(), RUN_AS_GROUP)
    } else if let Some(uid) = run_as_user {
        (
            id(uid, RUN_AS_USER)?.to_string(),
            RUN_AS_USER,
            String::new(),
            RUN_AS_GROUP,
        )
    } else if run_as_group.is_some() {
        return Err(SpecError::invalid(
            RUN_AS_GROUP,
            "set without run_as_user or run_as_username",
        ));
    } else {
        let (user, group) = image_user.split_once(':').unwrap_or((image_user, ""));
        (user.to_owned(), IMAGE_USER, group.to_owned(), IMAGE_USER)
    };

    let entry = find_user(&user, user_field, users)?;
    let gid = match run_as_group {
        Some(gid) => id(gid, RUN_AS_GROUP)?,
        None if !group.is_empty() => find_group(&group, group_field, users)?,
        None => entry.gid,
    };

    let mut groups = vec![gid];
    match security.map_or(Ok(SupplementalGroupsPolicy::Merge), |security| {
        SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy)
    }) {
        Ok(SupplementalGroupsPolicy::Merge) => {
            if let Some(name) = entry.name {
                let members = group_entries(users).filter(|group| group.members.contains(&name));
                groups.extend(members.map(|group| group.gid));
            }
        }
        Ok(SupplementalGroupsPolicy::Strict) => {}
        Err(unknown) => {
            let field = "linux.security_context.supplemental_groups_policy";
            return Err(SpecError::invalid(field, format!("unknown value {}", unknown.0)));
        }
    }
    for gid in security
        .into_iter()
        .flat_map(|security| &security.supplemental_groups)
    {
        groups.push(id(*gid, SUPPLEMENTAL_GROUPS)?);
    }
    groups.sort_unstable();
    groups.dedup();
    Ok(Identity {
        uid: entry.uid,
        gid,
        groups,
    })
}

struct FoundUser<'a> {
    uid: u32,
    gid: u32,
    name: Option<&'a str>,
}

fn find_user<'a>(user: &str, field: &str, users: &'a ImageUsers) -> Result<FoundUser<'a>> {
    // An image without USER is root's.
    let user = if user.is_empty() { "0" } else { user };
    // A user name may consist of digits, but an id is meant where the whole word is one.
    if let Some(uid) = numeric(user) {
        let entry = passwd_entries(users).find(|entry| entry.uid == uid);
        return Ok(match entry {
            Some(entry) => FoundUser {
                uid,
                gid: entry.gid,
                name: Some(entry.name),
            },
            None => FoundUser {
                uid,
                gid: 0,
                name: None,
            },
        });
    }
    match passwd_entries(users).find(|entry| entry.name == user) {
        Some(entry) => Ok(FoundUser {
            uid: entry.uid,
            gid: entry.gid,
            name: Some(entry.name),
        }),
        None => Err(SpecError::not_found(
            field,
            format!("no user {user:?} in the image's /etc/passwd"),
        )),
    }
}

fn find_group(group: &str, field: &str, users: &ImageUsers) -> Result<u32> {
    if let Some(gid) = numeric(group) {
        return Ok(gid);
    }
    match group_entries(users).find(|entry| entry.name == group) {
        Some(entry) => Ok(entry.gid),
        None => Err(SpecError::not_found(
            field,
            format!("no group {group:?} in the image's /etc/group"),
        )),
    }
}

fn id(value: i64, field: &str) -> Result<u32> {
    match u32::try_from(value) {
        Ok(id) if value <= MAX_ID => Ok(id),
        _ => Err(SpecError::invalid(
            field,
            format!("{value} is not between 0 and {MAX_ID}"),
        )),
    }
}

fn numeric(word: &str) -> Option<u32> {
    let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let value: i64 = digits.then(|| word.parse().ok())??;
    u32::try_from(value).ok().filter(|_| value <= MAX_ID)
}

/// Lines that do not parse are skipped, as getpwent(3) does; the file is the image author's.
fn lines(bytes: Option<&Vec<u8>>) -> impl Iterator<Item = &str> {
    let lines = bytes.map_or(&[][..], Vec::as_slice).split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(|line| line.trim_end_matches('\r'))
}

fn passwd_entries(users: &ImageUsers) -> impl Iterator<Item = Passwd<'_>> {
    lines(users.passwd.as_ref()).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (_, uid, gid) = (fields.next()?, numeric(fields.next()?)?, numeric(fields.next()?)?);
        Some(Passwd { name, uid, gid })
    })
}

fn group_entries(users: &ImageUsers) -> impl Iterator<Item = Group<'_>> {
    lines(users.group.as_ref()).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (_, gid) = (fields.next()?, numeric(fields.next()?)?);
        let members = fields
            .next()
            .unwrap_or("")
            .split(',')
            .filter(|member| !member.is_empty())
            .collect();
        Some(Group { name, gid, members })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind;
    use catamaran_cri_api::v1::Int64Value;

    fn users() -> ImageUsers {
        ImageUsers {
            passwd: Some(
                b"root:x:0:0::/root:/bin/sh\n# note\nbad\nweb:x:33:34:a:b:c\n\xff\xfe:x:1:1\n".to_vec(),
            ),
            group: Some(b"root:x:0:\nweb:x:34:\nlogs:x:40:web,other\nmore:x:39:other,web\nx:y\n".to_vec()),
        }
    }

    fn security(user: Option<i64>, group: Option<i64>, name: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            run_as_user: user.map(|value| Int64Value { value }),
            run_as_group: group.map(|value| Int64Value { value }),
            run_as_username: name.into(),
            ..Default::default()
        }
    }

    #[test]
    fn who() {
        let none = ImageUsers::default();
        let u = users();
        type Case<'a> = (
            LinuxContainerSecurityContext,
            &'a str,
            &'a ImageUsers,
            (u32, u32, &'a [u32]),
        );
        let cases: &[Case<'_>] = &[
            (security(None, None, ""), "", &none, (0, 0, &[0])),
            (security(None, None, ""), "web", &u, (33, 34, &[34, 39, 40])),
            (security(None, None, ""), "web:logs", &u, (33, 40, &[39, 40])),
            (security(None, None, ""), "web:7", &u, (33, 7, &[7, 39, 40])),
            (security(None, None, ""), "33", &u, (33, 34, &[34, 39, 40])),
            (security(None, None, ""), "1000", &u, (1000, 0, &[0])),
            (
                security(None, None, ""),
                "1000:1001",
                &none,
                (1000, 1001, &[1001]),
            ),
            (security(None, None, ""), ":logs", &u, (0, 40, &[40])),
            (security(Some(33), None, ""), "root", &u, (33, 34, &[34, 39, 40])),
            (
                security(Some(33), Some(5), ""),
                "root:logs",
                &u,
                (33, 5, &[5, 39, 40]),
            ),
            (security(Some(77), None, ""), "web:web", &u, (77, 0, &[0])),
            (security(None, None, "web"), "root", &u, (33, 34, &[34, 39, 40])),
            (security(None, Some(9), "web"), "root", &u, (33, 9, &[9, 39, 40])),
            (
                security(Some(1), None, "web"),
                "root",
                &u,
                (33, 34, &[34, 39, 40]),
            ),
            (security(None, None, "33"), "", &u, (33, 34, &[34, 39, 40])),
        ];
        for (security, image_user, users, (uid, gid, groups)) in cases {
            let who = resolve_identity(Some(security), image_user, users).expect(image_user);
            assert_eq!(
                (who.uid, who.gid, who.groups.as_slice()),
                (*uid, *gid, *groups),
                "{image_user}"
            );
        }
        assert_eq!(resolve_identity(None, "", &none).map(|who| who.uid), Ok(0));
    }

    #[test]
    fn supplemental_groups() {
        let u = users();
        let mut s = security(Some(33), None, "");
        s.supplemental_groups = vec![1234, 40];
        let merged = resolve_identity(Some(&s), "", &u).expect("merge");
        assert_eq!(merged.groups, [34, 39, 40, 1234]);
        s.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
        let strict = resolve_identity(Some(&s), "", &u).expect("strict");
        assert_eq!(strict.groups, [34, 40, 1234]);
        s.supplemental_groups_policy = 9;
        let error = resolve_identity(Some(&s), "", &u).expect_err("unknown policy");
        assert_eq!(error.field, "linux.security_context.supplemental_groups_policy");
    }

    #[test]
    fn refused() {
        let u = users();
        let of = |s: LinuxContainerSecurityContext, image: &str| {
            let error = resolve_identity(Some(&s), image, &u).expect_err(image);
            (error.kind, error.field)
        };
        use SpecErrorKind::{InvalidArgument, NotFound};
        assert_eq!(
            of(security(None, Some(1), ""), "web"),
            (InvalidArgument, RUN_AS_GROUP.into())
        );
        assert_eq!(
            of(security(Some(-1), None, ""), ""),
            (InvalidArgument, RUN_AS_USER.into())
        );
        assert_eq!(
            of(security(Some(1 << 32), None, ""), ""),
            (InvalidArgument, RUN_AS_USER.into())
        );
        assert_eq!(
            of(security(Some(1), Some(-4), ""), ""),
            (InvalidArgument, RUN_AS_GROUP.into())
        );
        assert_eq!(
            of(security(None, None, "nobody"), ""),
            (NotFound, RUN_AS_USERNAME.into())
        );
        assert_eq!(
            of(security(None, None, "web:web"), ""),
            (InvalidArgument, RUN_AS_USERNAME.into())
        );
        assert_eq!(
            of(security(None, None, ""), "ghost"),
            (NotFound, IMAGE_USER.into())
        );
        assert_eq!(
            of(security(None, None, ""), "web:ghosts"),
            (NotFound, IMAGE_USER.into())
        );
        assert_eq!(of(security(None, None, ""), "-1"), (NotFound, IMAGE_USER.into()));
        let mut groups = security(None, None, "");
        groups.supplemental_groups = vec![-1];
        assert_eq!(of(groups, ""), (InvalidArgument, SUPPLEMENTAL_GROUPS.into()));
    }
}
