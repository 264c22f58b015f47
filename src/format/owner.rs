//! Which agent writes a VM's history: a record is written each time that changes, and the one with the highest number
//! holds. File: `FileHeader` (kind owner), then the postcard body. Called by the site's store.

use crate::{
    format::{
        header::Kind,
        record::{self, RecordError},
    },
    id::VmId,
    units::{Generation, UnixMs},
};
use serde::{Deserialize, Serialize};

/// Who may write a VM's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// This agent.
    Agent(String),
    /// The guest was migrated away from this agent's host; whoever it came in to may take over.
    Left(String),
    /// An operator said that whoever has the guest running may take over from this agent.
    Released(String),
    /// The VM was failed over here, went back, and was handed over to this agent, which may adopt this generation although it
    /// was fenced.
    HandedTo { agent: String, generation: Generation },
}

impl Owner {
    /// The agent that may write now, if one may.
    pub fn writer(&self) -> Option<&str> {
        match self {
            Self::Agent(agent) | Self::HandedTo { agent, .. } => Some(agent),
            Self::Left(_) | Self::Released(_) => None,
        }
    }

    /// The agent that has it, or was the last to have it.
    pub fn agent(&self) -> &str {
        match self {
            Self::Agent(agent) | Self::Left(agent) | Self::Released(agent) => agent,
            Self::HandedTo { agent, .. } => agent,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    pub vm: VmId,
    /// Counts the records of this VM: the highest one there is holds.
    pub no: u64,
    pub owner: Owner,
    pub made_at: UnixMs,
}

impl OwnerRecord {
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        record::seal(Kind::Owner, VERSION, self)
    }

    pub fn decode(file: &[u8]) -> Result<Self, RecordError> {
        let record: Self = record::open(Kind::Owner, VERSION, file)?;
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), RecordError> {
        let agent = self.owner.agent();
        if agent.is_empty() || agent.len() > AGENT_MAX || agent.chars().any(char::is_control) {
            return Err(RecordError::Malformed("its agent's name is no name".into()));
        }
        Ok(())
    }
}

const VERSION: u16 = 1;
const AGENT_MAX: usize = 255;
/// Bytes of a record's whole file at the most.
pub const FILE_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(owner: Owner) -> OwnerRecord {
        OwnerRecord { vm: VmId::from_bytes([1; 16]), no: 7, owner, made_at: UnixMs(300) }
    }

    /// Version 1 as it was first shipped: a change here is a new version, not a new expectation.
    #[test]
    fn golden_bytes_of_an_owner_record_of_version_1() {
        let vm = "01".repeat(16);
        for (owner, golden) in [
            (Owner::Agent("a-1".into()), "0003612d31"),
            (Owner::Left("a-1".into()), "0103612d31"),
            (Owner::Released("a-1".into()), "0203612d31"),
            (Owner::HandedTo { agent: "a-1".into(), generation: Generation(300) }, "0303612d31ac02"),
        ] {
            let file = record(owner.clone()).encode().unwrap();
            let hex: String = file[64..].iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, format!("10{vm}07{golden}ac02"));
            assert_eq!(&file[..12], b"LIFEBOAT\x06\0\x01\0");
            assert_eq!(OwnerRecord::decode(&file), Ok(record(owner)));
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_a_cut_or_a_name_that_is_none_is_refused() {
        let file = record(Owner::Agent("host-a".into())).encode().unwrap();
        for bit in 0..file.len() * 8 {
            let mut bad = file.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(OwnerRecord::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(OwnerRecord::decode(&file[..len]).is_err(), "{len} bytes");
        }
        for name in [String::new(), "a\nb".into(), "a".repeat(256)] {
            assert!(record(Owner::Agent(name)).encode().is_err());
        }
    }
}
