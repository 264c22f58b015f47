//! What a trial of replicas asks of libvirt and an ordinary one does not: domains and networks that are gone once they are
//! ended, and a picture of a screen. Promises: a picture is bounded. Called by the site controller's drills.

use super::{connection::Hypervisor, domain::Domain, error::HypervisorError};
use virt::{error::Error, network::Network, stream::Stream};

/// Bytes of a picture at the most.
const PICTURE_MAX: usize = 32 << 20;

/// What a guest's first screen shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// `image/png`, or what else QEMU makes.
    pub kind: String,
    pub bytes: Vec<u8>,
}

impl Hypervisor {
    /// Starts a domain that is nowhere defined.
    pub fn start_transient(&self, xml: &str) -> Result<(), HypervisorError> {
        self.with("starting a domain", |link| link.connect.create_domain_xml(xml, 0).map(drop))
    }

    /// Starts a network that is nowhere defined.
    pub fn start_transient_network(&self, xml: &str) -> Result<(), HypervisorError> {
        self.with("starting a network", |link| link.connect.create_network_xml(xml).map(drop))
    }

    /// Ends a network. `false` if there is none of this name.
    pub fn end_network(&self, name: &str) -> Result<bool, HypervisorError> {
        let what = format!("ending network `{name}`");
        let ended = self.with(&what, |link| {
            let network: Network = link.connect.lookup_network_by_name(name)?;
            network.destroy()
        });
        match ended {
            Ok(()) => Ok(true),
            Err(HypervisorError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Domain {
    pub fn picture(&self) -> Result<Picture, HypervisorError> {
        let what = format!("domain `{}`: taking a picture of its screen", self.name());
        self.hypervisor().with(&what, |link| {
            let domain = link.connect.lookup_domain_by_uuid_string(&self.uuid().to_string())?;
            let stream = Stream::new(&link.connect, 0)?;
            let kind = domain.screenshot(&stream, 0, 0)?;
            let bytes = read(&stream)?;
            stream.finish()?;
            Ok(Picture { kind, bytes })
        })
    }
}

fn read(stream: &Stream) -> Result<Vec<u8>, Error> {
    let (mut bytes, mut part) = (Vec::new(), vec![0; 64 << 10]);
    while bytes.len() < PICTURE_MAX {
        let got = usize::try_from(stream.recv(&mut part)?).unwrap_or_default();
        if got == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..got.min(part.len())]);
    }
    Ok(bytes)
}
