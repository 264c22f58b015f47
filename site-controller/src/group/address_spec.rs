//! Addresses that a group's members are to have at the site, as its operator writes them down. What that means, and whether it
//! can be meant, [`super::addresses`] says.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One card of a member, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CardSpec {
    /// Its MAC address at the source, or the network or bridge that it is on there; without it, the only card there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<String>,
    /// Only at the site of this name; without it, at each that has the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    pub when: When,
    /// What it has instead of all its others of the same kind: `10.9.0.5/24`, `fd00:9::5/64`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<String>,
    /// One of each kind at the most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gateway: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// `keep`, `new`, or an address: `52:54:00:12:34:56`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// All addresses of members in one subnet, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SubnetSpec {
    pub from: String,
    /// As long as `from`: the host part of each address stays.
    pub to: String,
    /// Only of these members; without it, of all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<String>,
    pub when: When,
    /// In `to`; without it default routes stay as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
}

/// When a rule holds. One that says which counts more than one that says `always`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "AddressesWhen")]
pub enum When {
    Failover,
    Drill,
    #[default]
    Always,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    Failover,
    Drill,
}

impl When {
    pub(super) fn serves(self, occasion: Occasion) -> bool {
        match self {
            Self::Always => true,
            Self::Failover => occasion == Occasion::Failover,
            Self::Drill => occasion == Occasion::Drill,
        }
    }
}
