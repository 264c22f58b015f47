//! QUIC over loopback: frames on as many streams as an agent has, beside plain TCP with the same bytes. Both ends are in
//! this process, and share its processors.

use crate::{
    measure::{Took, Watch},
    pipeline::LEVEL,
    rows::Rows,
};
use anyhow::{Context, Result, bail};
use lifeboat::{
    clock::SystemClock,
    format::frame::Frame,
    id::{PointId, VmId},
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun},
    transport::{
        Connection, Incoming, RefusalCode, SiteEndpoint, TransportSettings, dial,
        enrol::{self, EnrolmentTokens},
        pki::{AGENT_VALIDITY, AgentIdentity, AgentName, SiteIdentity},
    },
};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
};

pub async fn measure(scratch: &Path, rows: &mut Rows) -> Result<()> {
    let mut raw = vec![0; GROUP_PAGES * PAGE];
    SmallRng::seed_from_u64(1).fill_bytes(&mut raw);
    let runs = vec![PageRun::new(0, GROUP_PAGES as u32)];
    let group = PageGroup { image: 0, runs, content: Content::Bytes(raw.into()) };
    let frame = Frame::seal(0, &group, LEVEL)?;
    let bytes = FRAMES as u64 * frame.encoded_len() as u64;

    let (agent, site, _endpoint) = connect(scratch).await?;
    // The first carries the windows and the datagram size up.
    carry(&agent, &site, &frame, FRAMES / 4).await?;
    let quic = carry(&agent, &site, &frame, FRAMES).await?;
    let stats = agent.stats();
    let tcp = tokio::task::spawn_blocking(move || plain_tcp(bytes)).await??;
    rows.add(
        "transport",
        quic.gb_per_s(bytes),
        "GB/s",
        tcp.gb_per_s(bytes),
        format!(
            "{STREAMS} QUIC streams on loopback, datagrams of {} bytes, {:.2} GB/cpu-s for both ends; limit: plain TCP",
            stats.current_mtu,
            quic.gb_per_cpu_s(bytes)
        ),
    );
    agent.close_and_wait(RefusalCode::DONE, "").await;
    Ok(())
}

/// An enrolled agent and its site, as they are made for real.
async fn connect(scratch: &Path) -> Result<(Connection, Connection, SiteEndpoint)> {
    let (settings, clock) = (TransportSettings::default(), SystemClock);
    let dir = scratch.join("identity");
    let identity = SiteIdentity::create(&dir, "bench", &["127.0.0.1".into()], &clock)?;
    let mut endpoint = SiteEndpoint::bind(SocketAddr::from(([127, 0, 0, 1], 0)), &identity, &settings)?;
    let address = endpoint.local_address()?.to_string();
    let tokens = EnrolmentTokens::open(&dir, identity.fingerprint(), Arc::new(clock));
    let token = tokens.issue(EnrolmentTokens::VALIDITY, None)?.token;
    let (name, own): (AgentName, _) = ("bench".parse()?, scratch.join("agent"));
    let serve = async {
        match endpoint.accept().await.context("the endpoint ended")? {
            Incoming::Enrolment(knocking) => {
                Ok(enrol::serve(knocking, &identity, &tokens, AGENT_VALIDITY, &clock).await?)
            }
            Incoming::Agent { .. } => bail!("an enrolment was expected"),
        }
    };
    let (enrolled, served) = tokio::join!(enrol::enrol(&address, &token, &name, &own, &settings), serve);
    let agent: AgentIdentity = enrolled?;
    served?;
    let (dialled, admitted) = tokio::join!(dial(&address, &agent, &settings), endpoint.accept());
    match admitted.context("the endpoint ended")? {
        Incoming::Agent { connection, .. } => Ok((dialled?, connection, endpoint)),
        Incoming::Enrolment(_) => bail!("an agent was expected"),
    }
}

/// Sends `count` frames, and returns when the last has been read.
async fn carry(agent: &Connection, site: &Connection, frame: &Frame, count: usize) -> Result<Took> {
    let watch = Watch::start();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        let (mut stream, frame) = (agent.open_data().await?, frame.clone());
        tasks.spawn(async move {
            for _ in 0..count / STREAMS {
                stream.send(VmId::from_bytes([1; 16]), PointId::from_bytes([2; 16]), &frame).await?;
            }
            stream.finish();
            Ok::<(), anyhow::Error>(())
        });
        let site = site.clone();
        tasks.spawn(async move {
            let mut stream = site.accept_data().await?;
            while let Some(landed) = stream.recv().await? {
                std::hint::black_box(landed);
            }
            Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(watch.stop())
}

fn plain_tcp(bytes: u64) -> Result<Took> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let watch = Watch::start();
    let sender = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, part) = (TcpStream::connect(address)?, vec![7; GROUP_PAGES * PAGE]);
        (0..bytes.div_ceil(part.len() as u64)).try_for_each(|_| stream.write_all(&part))
    });
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0; 1 << 20];
    while stream.read(&mut buffer)? > 0 {}
    match sender.join() {
        Ok(sent) => sent?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
    Ok(watch.stop())
}

/// 512 MiB.
const FRAMES: usize = 2048;
/// As many as an agent has.
const STREAMS: usize = 4;
