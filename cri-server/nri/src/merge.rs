//! The answers of several plugins to one request, put together in their order: each sees the container as those
//! before it have changed it, and what two of them claim is refused by name.

use std::collections::BTreeMap;

use crate::api::{
    self, CdiDevice, Container, ContainerAdjustment, ContainerUpdate, Field, KeyValue, LinuxDevice,
    LinuxNamespace, LinuxResources, Mount, PosixRlimit,
};
use crate::claims::Claims;
use crate::error::Error;

/// Something in a list that has a key; a leading '-' asks for removal.
trait Keyed: Clone {
    fn key(&self) -> &str;
}

macro_rules! keyed {
    ($($type:ty: $field:ident),*) => { $(impl Keyed for $type {
        fn key(&self) -> &str {
            &self.$field
        }
    })* };
}
keyed!(Mount: destination, LinuxDevice: path, KeyValue: key, LinuxNamespace: r#type, PosixRlimit: r#type, CdiDevice: name);

impl<V: Clone> Keyed for (String, V) {
    fn key(&self) -> &str {
        &self.0
    }
}

/// The key without the mark, and whether it had one.
#[must_use]
pub fn removal(key: &str) -> (&str, bool) {
    match key.strip_prefix('-') {
        Some(key) => (key, true),
        None => (key, false),
    }
}

/// Collects the answers to CreateContainer.
pub(crate) struct Creation {
    /// What the next plugin is shown.
    pub(crate) container: Container,
    pub(crate) adjust: ContainerAdjustment,
    pub(crate) updates: Updates,
}

impl Creation {
    pub(crate) fn new(container: Container) -> Self {
        Self {
            container,
            adjust: ContainerAdjustment::default(),
            updates: Updates::default(),
        }
    }

    /// Takes the answer of one plugin.
    ///
    /// # Errors
    /// [`Error::Conflict`], [`Error::UpdateOfNew`].
    pub(crate) fn apply(&mut self, answer: api::CreateContainerResponse, plugin: &str) -> Result<(), Error> {
        if let Some(adjust) = answer.adjust {
            self.adjust(adjust, plugin)?;
        }
        if let Some(own) = answer.update.iter().find(|u| u.container_id == self.container.id) {
            return Err(Error::UpdateOfNew {
                plugin: plugin.to_owned(),
                container: own.container_id.clone(),
            });
        }
        self.updates.apply(answer.update, answer.evict, plugin)
    }

    fn adjust(&mut self, from: ContainerAdjustment, plugin: &str) -> Result<(), Error> {
        let Self {
            container,
            adjust,
            updates,
        } = self;
        let mut step = Step {
            claims: &mut updates.claims,
            id: &container.id,
            plugin,
        };
        step.map(
            Field::Annotations,
            from.annotations,
            &mut container.annotations,
            &mut adjust.annotations,
        )?;
        step.list(
            Field::Mounts,
            from.mounts,
            &mut container.mounts,
            &mut adjust.mounts,
        )?;
        let mut env: Vec<KeyValue> = container.env.iter().map(|text| variable(text)).collect();
        step.list(Field::Env, from.env, &mut env, &mut adjust.env)?;
        container.env = env.iter().map(|v| format!("{}={}", v.key, v.value)).collect();
        let mut args = from.args;
        if !args.is_empty() {
            if args[0].is_empty() {
                step.claims.clear(step.id, Field::Args, "", plugin);
                args.remove(0);
            }
            step.claim(Field::Args, "")?;
            container.args.clone_from(&args);
            adjust.args = args;
        }
        if let Some(hooks) = from.hooks {
            step.hooks(
                &hooks,
                container.hooks.get_or_insert_default(),
                adjust.hooks.get_or_insert_default(),
            );
        }
        step.list(
            Field::Rlimits,
            from.rlimits,
            &mut container.rlimits,
            &mut adjust.rlimits,
        )?;
        step.list(
            Field::CdiDevices,
            from.cdi_devices,
            &mut container.cdi_devices,
            &mut adjust.cdi_devices,
        )?;
        match from.linux {
            Some(linux) => {
                let shown = container.linux.get_or_insert_default();
                step.linux(linux, shown, adjust.linux.get_or_insert_default())
            }
            None => Ok(()),
        }
    }
}

/// `NAME=value` of an environment.
fn variable(text: &str) -> KeyValue {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    KeyValue {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

/// One plugin's claims on one container.
struct Step<'a> {
    claims: &'a mut Claims,
    id: &'a str,
    plugin: &'a str,
}

impl Step<'_> {
    fn claim(&mut self, field: Field, key: &str) -> Result<(), Error> {
        self.claims.claim(self.id, field, key, self.plugin)
    }

    fn list<T: Keyed>(
        &mut self,
        field: Field,
        from: Vec<T>,
        shown: &mut Vec<T>,
        reply: &mut Vec<T>,
    ) -> Result<(), Error> {
        let (removed, added): (Vec<T>, Vec<T>) = from.into_iter().partition(|item| removal(item.key()).1);
        for item in removed {
            let key = removal(item.key()).0.to_owned();
            self.claims.clear(self.id, field, &key, self.plugin);
            shown.retain(|other| other.key() != key);
            reply.retain(|other| removal(other.key()).0 != key);
            reply.push(item);
        }
        for item in added {
            let key = item.key().to_owned();
            self.claim(field, &key)?;
            shown.retain(|other| other.key() != key);
            reply.retain(|other| removal(other.key()).0 != key);
            shown.push(item.clone());
            reply.push(item);
        }
        Ok(())
    }

    fn map<V: Clone>(
        &mut self,
        field: Field,
        from: BTreeMap<String, V>,
        shown: &mut BTreeMap<String, V>,
        reply: &mut BTreeMap<String, V>,
    ) -> Result<(), Error> {
        let mut lists = (
            std::mem::take(shown).into_iter().collect(),
            std::mem::take(reply).into_iter().collect(),
        );
        let result = self.list(field, from.into_iter().collect(), &mut lists.0, &mut lists.1);
        *shown = lists.0.into_iter().collect();
        *reply = lists.1.into_iter().collect();
        result
    }

    fn one<T: Clone>(
        &mut self,
        field: Field,
        from: Option<T>,
        shown: &mut Option<T>,
        reply: &mut Option<T>,
    ) -> Result<(), Error> {
        if from.is_some() {
            self.claim(field, "")?;
            shown.clone_from(&from);
            *reply = from;
        }
        Ok(())
    }

    fn hooks(&mut self, from: &api::Hooks, shown: &mut api::Hooks, reply: &mut api::Hooks) {
        for hooks in [shown, reply] {
            hooks.prestart.extend_from_slice(&from.prestart);
            hooks.create_runtime.extend_from_slice(&from.create_runtime);
            hooks.create_container.extend_from_slice(&from.create_container);
            hooks.start_container.extend_from_slice(&from.start_container);
            hooks.poststart.extend_from_slice(&from.poststart);
            hooks.poststop.extend_from_slice(&from.poststop);
        }
        if *from != api::Hooks::default() {
            self.claims.share(self.id, Field::OciHooks, self.plugin);
        }
    }

    fn linux(
        &mut self,
        from: api::LinuxContainerAdjustment,
        shown: &mut api::LinuxContainer,
        reply: &mut api::LinuxContainerAdjustment,
    ) -> Result<(), Error> {
        self.list(
            Field::Devices,
            from.devices,
            &mut shown.devices,
            &mut reply.devices,
        )?;
        if let Some(resources) = from.resources {
            self.resources(&resources)?;
            overlay(&resources, shown.resources.get_or_insert_default());
            overlay(&resources, reply.resources.get_or_insert_default());
        }
        if !from.cgroups_path.is_empty() {
            self.claim(Field::CgroupsPath, "")?;
            shown.cgroups_path.clone_from(&from.cgroups_path);
            reply.cgroups_path = from.cgroups_path;
        }
        self.one(
            Field::OomScoreAdj,
            from.oom_score_adj,
            &mut shown.oom_score_adj,
            &mut reply.oom_score_adj,
        )?;
        self.one(
            Field::IoPriority,
            from.io_priority,
            &mut shown.io_priority,
            &mut reply.io_priority,
        )?;
        self.one(
            Field::SeccompPolicy,
            from.seccomp_policy,
            &mut shown.seccomp_policy,
            &mut reply.seccomp_policy,
        )?;
        self.list(
            Field::Namespace,
            from.namespaces,
            &mut shown.namespaces,
            &mut reply.namespaces,
        )?;
        self.map(Field::Sysctl, from.sysctl, &mut shown.sysctl, &mut reply.sysctl)?;
        self.map(
            Field::LinuxNetDevices,
            from.net_devices,
            &mut shown.net_devices,
            &mut reply.net_devices,
        )?;
        self.one(
            Field::LinuxSched,
            from.scheduler,
            &mut shown.scheduler,
            &mut reply.scheduler,
        )?;
        self.one(Field::RdtClosId, from.rdt, &mut shown.rdt, &mut reply.rdt)?;
        self.one(
            Field::MemoryPolicy,
            from.memory_policy,
            &mut None,
            &mut reply.memory_policy,
        )
    }

    fn resources(&mut self, from: &LinuxResources) -> Result<(), Error> {
        let memory = from.memory.unwrap_or_default();
        let cpu = from.cpu.clone().unwrap_or_default();
        for (field, set) in [
            (Field::MemLimit, memory.limit.is_some()),
            (Field::MemReservation, memory.reservation.is_some()),
            (Field::MemSwapLimit, memory.swap.is_some()),
            (Field::MemKernelLimit, memory.kernel.is_some()),
            (Field::MemTcpLimit, memory.kernel_tcp.is_some()),
            (Field::MemSwappiness, memory.swappiness.is_some()),
            (Field::MemDisableOomKiller, memory.disable_oom_killer.is_some()),
            (Field::MemUseHierarchy, memory.use_hierarchy.is_some()),
            (Field::CpuShares, cpu.shares.is_some()),
            (Field::CpuQuota, cpu.quota.is_some()),
            (Field::CpuPeriod, cpu.period.is_some()),
            (Field::CpuRealtimeRuntime, cpu.realtime_runtime.is_some()),
            (Field::CpuRealtimePeriod, cpu.realtime_period.is_some()),
            (Field::CpuSetCpUs, !cpu.cpus.is_empty()),
            (Field::CpuSetMems, !cpu.mems.is_empty()),
            (Field::PidsLimit, from.pids.is_some()),
            (Field::BlockioClass, from.blockio_class.is_some()),
            (Field::RdtClass, from.rdt_class.is_some()),
        ] {
            if set {
                self.claim(field, "")?;
            }
        }
        for limit in &from.hugepage_limits {
            self.claim(Field::HugepageLimits, &limit.page_size)?;
        }
        for key in from.unified.keys() {
            self.claim(Field::CgroupsUnified, key)?;
        }
        Ok(())
    }
}

/// Puts what `from` says over `into`.
pub(crate) fn overlay(from: &LinuxResources, into: &mut LinuxResources) {
    macro_rules! over {
        ($from:expr, $into:expr, $($field:ident),*) => { $(if $from.$field.is_some() {
            $into.$field.clone_from(&$from.$field);
        })* };
    }
    if let Some(memory) = &from.memory {
        let into = into.memory.get_or_insert_default();
        over!(
            memory,
            into,
            limit,
            reservation,
            swap,
            kernel,
            kernel_tcp,
            swappiness,
            disable_oom_killer,
            use_hierarchy
        );
    }
    if let Some(cpu) = &from.cpu {
        let into = into.cpu.get_or_insert_default();
        over!(
            cpu,
            into,
            shares,
            quota,
            period,
            realtime_runtime,
            realtime_period
        );
        for (text, into) in [(&cpu.cpus, &mut into.cpus), (&cpu.mems, &mut into.mems)] {
            if !text.is_empty() {
                into.clone_from(text);
            }
        }
    }
    over!(from, into, pids, blockio_class, rdt_class);
    for limit in &from.hugepage_limits {
        into.hugepage_limits
            .retain(|other| other.page_size != limit.page_size);
        into.hugepage_limits.push(limit.clone());
    }
    into.unified.extend(from.unified.clone());
    into.devices.extend_from_slice(&from.devices);
}

/// Collects the updates of containers that plugins ask for.
#[derive(Debug, Default)]
pub(crate) struct Updates {
    pub(crate) claims: Claims,
    list: Vec<ContainerUpdate>,
    evict: Vec<api::ContainerEviction>,
}

/// What plugins want of containers that exist.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// New limits.
    pub updates: Vec<ContainerUpdate>,
    /// To be stopped.
    pub evictions: Vec<api::ContainerEviction>,
}

impl Updates {
    /// Takes the answer of one plugin.
    ///
    /// # Errors
    /// [`Error::Conflict`], but where the plugin said that a failure of its update is none.
    pub(crate) fn apply(
        &mut self,
        updates: Vec<ContainerUpdate>,
        evict: Vec<api::ContainerEviction>,
        plugin: &str,
    ) -> Result<(), Error> {
        self.evict.extend(evict);
        for update in updates {
            let resources = update.linux.and_then(|linux| linux.resources).unwrap_or_default();
            let before = self.claims.clone();
            let claimed = Step {
                claims: &mut self.claims,
                id: &update.container_id,
                plugin,
            }
            .resources(&resources);
            if let Err(error) = claimed {
                self.claims = before;
                if update.ignore_failure {
                    tracing::info!(%error, "an update that may fail is left out");
                    continue;
                }
                return Err(error);
            }
            let known = self
                .list
                .iter()
                .position(|u| u.container_id == update.container_id);
            let at = known.unwrap_or_else(|| {
                self.list.push(ContainerUpdate {
                    container_id: update.container_id.clone(),
                    linux: None,
                    ignore_failure: true,
                });
                self.list.len() - 1
            });
            let merged = &mut self.list[at];
            merged.ignore_failure &= update.ignore_failure;
            let linux = merged.linux.get_or_insert_default();
            overlay(&resources, linux.resources.get_or_insert_default());
        }
        Ok(())
    }

    /// What plugins want of the container itself that is being updated, so far.
    pub(crate) fn of(&self, container: &str) -> Option<&LinuxResources> {
        let update = self.list.iter().find(|u| u.container_id == container)?;
        update.linux.as_ref()?.resources.as_ref()
    }

    pub(crate) fn finish(self) -> Wanted {
        Wanted {
            updates: self.list,
            evictions: self.evict,
        }
    }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
