//! A long line where the kernel has no netem: datagrams to a port of a site arrive there only after a while, and so do
//! the answers. Lives in this process, and ends with it or when dropped. Calls `site`.

use crate::site::Site;
use anyhow::{Context, Result};
use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

pub struct LongLine {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

/// Datagrams on their way, and when each arrives.
type OnTheWay = mpsc::Sender<(Instant, Vec<u8>)>;

impl LongLine {
    /// What comes to `port` of `site` goes on to its `to`, each way `delay` later. For one caller at a time.
    pub fn open(site: &Site, port: u16, to: u16, delay: Duration) -> Result<Self> {
        let address = SocketAddr::from((site.address(), port));
        let bind = |port: u16| {
            let socket = site.in_network(|| UdpSocket::bind((site.address(), port)))?;
            let socket = socket.with_context(|| format!("binding port {port} of {}", site.name()))?;
            socket.set_read_timeout(Some(LOOK))?;
            anyhow::Ok(Arc::new(socket))
        };
        let (here, there) = (bind(port)?, bind(0)?);
        there.connect((site.address(), to))?;
        let ended = Arc::new(AtomicBool::new(false));
        let caller: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let (out, from, on) = (there.clone(), caller.clone(), ended.clone());
        let way = carry(delay, move |datagram| out.send(datagram));
        let listening = here.clone();
        thread::spawn(move || {
            listen(&on, delay, &way, |buffer| {
                let (len, caller) = listening.recv_from(buffer)?;
                *from.lock().unwrap_or_else(PoisonError::into_inner) = Some(caller);
                Ok(len)
            });
        });
        let on = ended.clone();
        let back = carry(delay, move |datagram| {
            let caller = *caller.lock().unwrap_or_else(PoisonError::into_inner);
            caller.map_or(Ok(0), |caller| here.send_to(datagram, caller))
        });
        thread::spawn(move || listen(&on, delay, &back, |buffer| there.recv(buffer)));
        Ok(Self { address, ended })
    }

    /// `host:port` for agents.
    pub fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for LongLine {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn listen(
    ended: &AtomicBool,
    delay: Duration,
    way: &OnTheWay,
    mut receive: impl FnMut(&mut [u8]) -> io::Result<usize>,
) {
    let mut buffer = vec![0; 1 << 16];
    while !ended.load(Ordering::Relaxed) {
        // An error is a time that is over, or a port that nobody listens at (yet).
        let Ok(len) = receive(&mut buffer) else { continue };
        if way.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
            return;
        }
    }
}

/// Lets datagrams arrive when it is time.
fn carry(delay: Duration, deliver: impl Fn(&[u8]) -> io::Result<usize> + Send + 'static) -> OnTheWay {
    let (way, arriving) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (at, datagram) in arriving {
            // All take the same time, so that they arrive in the order in which they set out.
            thread::sleep(at.saturating_duration_since(Instant::now()).min(delay));
            // Lost, if there is nobody: it is a line.
            let _ = deliver(&datagram);
        }
    });
    way
}

/// How often it is looked whether the line is still wanted.
const LOOK: Duration = Duration::from_millis(200);
