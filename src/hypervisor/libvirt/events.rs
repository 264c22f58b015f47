//! What happens to domains, as libvirt and QEMU report it, turned into values on a bounded channel.
//! Promises: the callbacks only send; a full channel drops the oldest and the receiver learns that it lagged.

use crate::id::VmId;
use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use tokio::sync::broadcast;
use virt::{connect::Connect, error::Error, sys};

/// Something happened to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainEvent {
    /// `None` where it concerns all of them.
    pub vm: Option<VmId>,
    pub happened: Happened,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    Defined,
    Undefined,
    Started,
    Suspended,
    Resumed,
    /// The guest is shutting down, or its QEMU has ended.
    Stopped,
    Crashed,
    /// The guest was migrated to another host.
    Left,
    /// A migration, a save, a dump or a block job of somebody's, or a migration of ours, has come a step further.
    JobChanged,
    /// The guest has let go of a device.
    Unplugged,
    /// The guest was reset: its firmware runs anew, and ROMs may have changed.
    Reset,
    /// The connection was made anew: anything may have happened.
    EventsMissed,
}

type Lifecycle =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type Monitored = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    c_longlong,
    c_uint,
    *const c_char,
    *mut c_void,
);
type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

/// Registers for lifecycle and reset events; returns libvirt's callback numbers.
pub(super) fn register(
    connect: &Connect,
    events: &broadcast::Sender<DomainEvent>,
) -> Result<Vec<i32>, Error> {
    // SAFETY: libvirt stores the lifecycle callback under its generic type and calls it back by its real one.
    let lifecycle = unsafe { std::mem::transmute::<Lifecycle, Generic>(on_lifecycle) };
    let wanted: [(sys::virDomainEventID, Generic); 2] =
        [(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle), (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reset)];
    let mut callbacks = Vec::with_capacity(wanted.len());
    for (id, callback) in wanted {
        let opaque = Box::into_raw(Box::new(events.clone())).cast::<c_void>();
        // SAFETY: the connection is open; `opaque` lives until libvirt hands it to `free_sender`, exactly once.
        let number = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                std::ptr::null_mut(),
                id as c_int,
                Some(callback),
                opaque,
                Some(free_sender),
            )
        };
        if number < 0 {
            let error = Error::last_error();
            // SAFETY: registration failed, so libvirt does not own `opaque`.
            unsafe { free_sender(opaque) };
            deregister(connect, &callbacks);
            return Err(error);
        }
        callbacks.push(number);
    }
    Ok(callbacks)
}

/// Registers for events of QEMU's own that libvirt has no event for; `None` where libvirt does not pass them on.
pub(super) fn register_monitor(connect: &Connect, events: &broadcast::Sender<DomainEvent>) -> Option<i32> {
    let opaque = Box::into_raw(Box::new(events.clone())).cast::<c_void>();
    let callback: Monitored = on_monitor;
    // SAFETY: the connection is open and the pattern ends with a NUL; `opaque` lives until libvirt hands it to
    // `free_sender`, exactly once.
    let number = unsafe {
        sys::virConnectDomainQemuMonitorEventRegister(
            connect.as_ptr(),
            std::ptr::null_mut(),
            MONITOR_EVENTS.as_ptr(),
            Some(callback),
            opaque,
            Some(free_sender),
            sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
        )
    };
    if number < 0 {
        // SAFETY: registration failed, so libvirt does not own `opaque`.
        unsafe { free_sender(opaque) };
        return None;
    }
    Some(number)
}

pub(super) fn deregister_monitor(connect: &Connect, number: i32) {
    // SAFETY: the connection is still referenced, and the number came from it. A dead connection refuses, harmlessly.
    unsafe { sys::virConnectDomainQemuMonitorEventDeregister(connect.as_ptr(), number) };
}

unsafe extern "C" fn on_monitor(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    _seconds: c_longlong,
    _micros: c_uint,
    _details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the event's name as a C string.
    let unplugged = unsafe { CStr::from_ptr(event) } == c"DEVICE_DELETED";
    // SAFETY: libvirt passes a live domain and the `opaque` of `register_monitor`.
    unsafe { send(domain, opaque, if unplugged { Happened::Unplugged } else { Happened::JobChanged }) };
}

const MONITOR_EVENTS: &CStr = c"^(MIGRATION|JOB_STATUS_CHANGE|DEVICE_DELETED)$";

pub(super) fn deregister(connect: &Connect, callbacks: &[i32]) {
    for number in callbacks {
        // SAFETY: the connection is still referenced, and the number came from it. A dead connection refuses, harmlessly.
        unsafe { sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), *number) };
    }
}

unsafe extern "C" fn free_sender(opaque: *mut c_void) {
    // SAFETY: `opaque` is the box that `register` made; libvirt calls this once.
    drop(unsafe { Box::from_raw(opaque.cast::<broadcast::Sender<DomainEvent>>()) });
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let migrated = detail == sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED as c_int;
    let happened = match u32::try_from(event).unwrap_or(u32::MAX) {
        sys::VIR_DOMAIN_EVENT_DEFINED => Happened::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => Happened::Undefined,
        sys::VIR_DOMAIN_EVENT_STARTED => Happened::Started,
        sys::VIR_DOMAIN_EVENT_SUSPENDED | sys::VIR_DOMAIN_EVENT_PMSUSPENDED => Happened::Suspended,
        sys::VIR_DOMAIN_EVENT_RESUMED => Happened::Resumed,
        sys::VIR_DOMAIN_EVENT_STOPPED if migrated => Happened::Left,
        sys::VIR_DOMAIN_EVENT_STOPPED | sys::VIR_DOMAIN_EVENT_SHUTDOWN => Happened::Stopped,
        sys::VIR_DOMAIN_EVENT_CRASHED => Happened::Crashed,
        _ => return 0,
    };
    // SAFETY: libvirt passes a live domain and the `opaque` of `register`.
    unsafe { send(domain, opaque, happened) };
    0
}

unsafe extern "C" fn on_reset(_connect: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { send(domain, opaque, Happened::Reset) };
}

unsafe fn send(domain: sys::virDomainPtr, opaque: *mut c_void, happened: Happened) {
    let mut text = [0 as c_char; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the buffer has the length that libvirt asks for, and libvirt ends it with a NUL.
    let vm = unsafe {
        if sys::virDomainGetUUIDString(domain, text.as_mut_ptr()) < 0 {
            return;
        }
        CStr::from_ptr(text.as_ptr()).to_str().ok().and_then(|text| text.parse::<VmId>().ok())
    };
    // SAFETY: `opaque` is the sender that `register` boxed; libvirt frees it only after the last call.
    let events = unsafe { &*opaque.cast::<broadcast::Sender<DomainEvent>>() };
    // Nobody may be listening, which is no error.
    let _ = events.send(DomainEvent { vm, happened });
}
