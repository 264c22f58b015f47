//! A connection to one libvirtd that is made again when it broke.
//! Promises: a call never uses a connection known to be dead; subscribers are told that events may have been missed.

use super::{
    error::HypervisorError,
    events::{self, DomainEvent, Happened},
};
use std::sync::{
    Arc, Mutex, MutexGuard, Once, PoisonError,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::broadcast;
use virt::{connect::Connect, error::Error, sys};

/// Seconds between keep-alive messages, and how many may go unanswered.
const KEEP_ALIVE: (i32, u32) = (5, 6);
const EVENTS_KEPT: usize = 1024;

/// A libvirtd. Cheap to clone; all clones share one connection.
#[derive(Clone)]
pub struct Hypervisor {
    inner: Arc<Inner>,
}

struct Inner {
    uri: String,
    link: Mutex<Option<Arc<Link>>>,
    links_made: AtomicU64,
    events: broadcast::Sender<DomainEvent>,
}

/// One connection, from open to close.
pub(super) struct Link {
    pub connect: Connect,
    /// Tells handles of an earlier connection from those of this one.
    pub number: u64,
    callbacks: Vec<i32>,
    monitor_callback: Option<i32>,
}

impl Drop for Link {
    fn drop(&mut self) {
        events::deregister(&self.connect, &self.callbacks);
        if let Some(number) = self.monitor_callback {
            events::deregister_monitor(&self.connect, number);
        }
    }
}

impl Hypervisor {
    /// Connects to `uri` (`qemu:///system`, or with `?socket=…`).
    pub fn connect(uri: &str) -> Result<Self, HypervisorError> {
        let hypervisor = Self::lazy(uri);
        hypervisor.link()?;
        Ok(hypervisor)
    }

    /// The same, by the first call that needs it.
    pub fn lazy(uri: &str) -> Self {
        prepare_library();
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let inner = Inner { uri: uri.into(), link: Mutex::new(None), links_made: AtomicU64::new(0), events };
        Self { inner: Arc::new(inner) }
    }

    pub fn uri(&self) -> &str {
        &self.inner.uri
    }

    /// Whether its host is this one: what it names by path lies here.
    pub fn is_local(&self) -> bool {
        host_of(&self.inner.uri).is_none()
    }

    /// What happens to domains from now on. A receiver that lags, and [`Happened::EventsMissed`], both mean: look anew.
    pub fn subscribe(&self) -> broadcast::Receiver<DomainEvent> {
        self.inner.events.subscribe()
    }

    /// libvirt's own version at the other end, as `major.minor.release`.
    pub fn version(&self) -> Result<String, HypervisorError> {
        let number = self.with("asking libvirt's version", |link| link.connect.lib_version())?;
        Ok(format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000))
    }

    /// Resumes a guest from a save image: a file, or `/proc/PID/fd/N` of something that reads like one. `xml` replaces
    /// the XML in the image.
    pub fn restore(
        &self,
        path: &str,
        xml: Option<&str>,
        start_as: super::StartAs,
    ) -> Result<(), HypervisorError> {
        let flags = match start_as {
            super::StartAs::Running => sys::VIR_DOMAIN_SAVE_RUNNING,
            super::StartAs::Paused => sys::VIR_DOMAIN_SAVE_PAUSED,
        };
        self.with(&format!("restoring from {path}"), |link| {
            link.connect.restore_domain_flags(path, xml, flags)
        })
    }

    /// Whether a network of this name is there and active.
    pub fn network_is_active(&self, name: &str) -> Result<bool, HypervisorError> {
        let asked = self.with(&format!("network `{name}`"), |link| {
            link.connect.lookup_network_by_name(name)?.is_active()
        });
        match asked {
            Err(HypervisorError::NotFound { .. }) => Ok(false),
            other => other,
        }
    }

    /// Runs `ask` on a live connection.
    pub(super) fn with<T>(
        &self,
        what: &str,
        ask: impl FnOnce(&Arc<Link>) -> Result<T, Error>,
    ) -> Result<T, HypervisorError> {
        let link = self.link()?;
        ask(&link).map_err(|error| {
            let alive = link.connect.is_alive().unwrap_or(false);
            HypervisorError::from_virt(what, &error, alive)
        })
    }

    fn link(&self) -> Result<Arc<Link>, HypervisorError> {
        let mut slot = lock(&self.inner.link);
        if let Some(link) = slot.as_ref().filter(|link| link.connect.is_alive().unwrap_or(false)) {
            return Ok(link.clone());
        }
        let lost = |error: Error| HypervisorError::ConnectionLost {
            what: format!("connecting to {}", self.inner.uri),
            words: error.message().to_owned(),
        };
        let connect = Connect::open(Some(&self.inner.uri)).map_err(lost)?;
        // Local connections of some drivers have no keep-alive; they can't hang either.
        let _ = connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1);
        let callbacks = events::register(&connect, &self.inner.events).map_err(lost)?;
        let monitor_callback = events::register_monitor(&connect, &self.inner.events);
        let number = self.inner.links_made.fetch_add(1, Ordering::SeqCst);
        if number > 0 {
            let _ = self.inner.events.send(DomainEvent { vm: None, happened: Happened::EventsMissed });
        }
        let link = Arc::new(Link { connect, number, callbacks, monitor_callback });
        *slot = Some(link.clone());
        Ok(link)
    }
}

/// The host that a connection URI leads to (`qemu+ssh://root@kvm2:22/system`); `None`: this one.
pub fn host_of(uri: &str) -> Option<&str> {
    let (scheme, rest) = uri.split_once("://")?;
    let place = rest.split(['/', '?']).next().unwrap_or_default();
    let place = place.rsplit_once('@').map_or(place, |(_, host)| host);
    let host = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => place.split(':').next().unwrap_or_default(),
    };
    let transport = scheme.split_once('+').map_or("", |(_, transport)| transport);
    match host {
        "" if matches!(transport, "" | "unix") => None,
        "" => Some("localhost"),
        host => Some(host),
    }
}

/// A panic elsewhere leaves these locks' contents sound: each is replaced in one step.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Once per process, before the first connection: errors are returned and not printed, events are delivered.
fn prepare_library() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        virt::error::clear_error_callback();
        if virt::event::event_register_default_impl().is_ok() {
            let run = || loop {
                if virt::event::event_run_default_impl().is_err() {
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            };
            // Without the thread there are no events and no keep-alive, and everything else works.
            if let Err(error) = std::thread::Builder::new().name("libvirt-events".into()).spawn(run) {
                tracing::warn!(%error, "no thread for libvirt's events: guest resets will go unnoticed");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_which_host_it_leads_to() {
        for (uri, host) in [
            ("qemu:///system", None),
            ("qemu+unix:///system?socket=/run/other/sock", None),
            ("qemu+ssh://root@kvm2.example.com/system", Some("kvm2.example.com")),
            ("qemu+ssh://a@b@kvm2:2222/system?keyfile=/x@y", Some("kvm2")),
            ("qemu+tls://[2001:db8::7]:16514/system", Some("2001:db8::7")),
            ("qemu+tcp://127.0.0.1/system", Some("127.0.0.1")),
            ("qemu://kvm3/system", Some("kvm3")),
            ("qemu+tls:///system", Some("localhost")),
            ("nonsense", None),
        ] {
            assert_eq!(host_of(uri), host, "{uri}");
        }
    }
}
