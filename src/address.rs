//! Addresses of network cards and of guests: of a card, of a guest with the length of its subnet, and subnets of which one
//! stands for another.
//! Promises: nothing is taken that is not exactly an address, and each prints as programs read it: a guest's or an
//! operator's text goes on as an address, or not at all. Pure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// What was given is no such address; says what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoAddress(pub &'static str);

/// The address of a network card.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    pub const fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 6] {
        &self.0
    }

    /// One that was made up, as libvirt makes them up for QEMU: no vendor's.
    pub const fn made_up(of: [u8; 3]) -> Self {
        Self([0x52, 0x54, 0x00, of[0], of[1], of[2]])
    }

    /// One that a card can have: not a group's, and not none.
    pub fn is_a_card_s(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let refuse = NoAddress("write a MAC address: `52:54:00:12:34:56`");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(|| refuse.clone())?;
            // A sign would be read as part of the number.
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(|| refuse.clone())?;
        }
        if parts.next().is_some() { Err(refuse) } else { Ok(Self(bytes)) }
    }
}

/// An address of a guest, with how many bits of it are its subnet's: `10.9.0.5/24`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Address {
    pub ip: IpAddr,
    bits: u8,
}

impl Address {
    /// Nothing, if no subnet of this kind is so long.
    pub fn new(ip: IpAddr, bits: u8) -> Option<Self> {
        (bits <= width(ip)).then_some(Self { ip, bits })
    }

    /// Another one, in a subnet that is as long.
    pub fn at(&self, ip: IpAddr) -> Option<Self> {
        Self::new(ip, self.bits)
    }

    pub fn subnet(&self) -> Subnet {
        Subnet { first: masked(self.ip, self.bits), bits: self.bits }
    }

    /// One that a guest can be reached at: no network's own, nobody's, and none that holds on one wire or machine only.
    pub fn is_a_guest_s(&self) -> bool {
        let of_one = self.bits >= width(self.ip).saturating_sub(1);
        let of_network = !of_one && self.subnet().first == self.ip;
        let of_all = match self.ip {
            IpAddr::V4(ip) => {
                !of_one && ip.to_bits() | u32::MAX.checked_shr(self.bits.into()).unwrap_or(0) == ip.to_bits()
            }
            IpAddr::V6(_) => false,
        };
        let bad = self.ip.is_unspecified() || self.ip.is_loopback() || self.ip.is_multicast();
        !(bad || of_network || of_all || is_link_local(self.ip) || self.bits == 0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.bits)
    }
}

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (ip, bits) =
            split(text).ok_or(NoAddress("write an address and how long its subnet is: `10.9.0.5/24`"))?;
        Ok(Self { ip, bits })
    }
}

/// A subnet: `10.9.0.0/24`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Subnet {
    first: IpAddr,
    bits: u8,
}

impl Subnet {
    pub fn has(&self, ip: IpAddr) -> bool {
        self.first.is_ipv4() == ip.is_ipv4() && masked(ip, self.bits) == self.first
    }

    /// Whether the host part of an address in one can stand in the other as it is.
    pub fn is_as_long_as(&self, other: &Self) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4() && self.bits == other.bits
    }

    pub fn meets(&self, other: &Self) -> bool {
        self.has(other.first) || other.has(self.first)
    }

    /// An address in it, with its host part as it is in `to`, which must be as long.
    pub fn lead(&self, ip: IpAddr, to: &Self) -> Option<IpAddr> {
        if !self.has(ip) || !self.is_as_long_as(to) {
            return None;
        }
        Some(match (ip, to.first) {
            (IpAddr::V4(ip), IpAddr::V4(to)) => {
                let host = ip.to_bits() & !mask32(self.bits);
                IpAddr::V4(Ipv4Addr::from_bits(to.to_bits() | host))
            }
            (IpAddr::V6(ip), IpAddr::V6(to)) => {
                let host = ip.to_bits() & !mask128(self.bits);
                IpAddr::V6(Ipv6Addr::from_bits(to.to_bits() | host))
            }
            _ => return None,
        })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

impl FromStr for Subnet {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (first, bits) = split(text).ok_or(NoAddress("write a subnet: `10.9.0.0/24`"))?;
        if masked(first, bits) != first {
            return Err(NoAddress(
                "write the first address of the subnet, whose host part is 0: `10.9.0.0/24`",
            ));
        }
        Ok(Self { first, bits })
    }
}

/// Holds on one wire only.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// An address of `std`, which knows no zones or signs, and a length without signs or leading zeros.
fn split(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, bits) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    let digits = bits.bytes().all(|digit| digit.is_ascii_digit()) && (bits == "0" || !bits.starts_with('0'));
    let bits: u8 = bits.parse().ok().filter(|_| digits)?;
    (bits <= width(ip)).then_some((ip, bits))
}

fn width(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn masked(ip: IpAddr, bits: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask32(bits))),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask128(bits))),
    }
}

fn mask32(bits: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0)
}

fn mask128(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0)
}

/// Each is written, stored and sent as it prints.
macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = NoAddress;
            fn try_from(text: String) -> Result<Self, NoAddress> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(of: $name) -> Self {
                of.to_string()
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    };
}

as_text!(Mac);
as_text!(Address);
as_text!(Subnet);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_not_exactly_an_address_is_refused() {
        let mac: Mac = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:1",
            "52-54-00-ab-cd-0f",
            "5:54:00:ab:cd:0f",
            "+2:54:00:ab:cd:0f",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        let group: Mac = "01:00:5e:00:00:01".parse().unwrap();
        assert!(mac.is_a_card_s() && !group.is_a_card_s() && !Mac::from_bytes([0; 6]).is_a_card_s());
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1/33",
            "10.0.0/24",
            "10.0.0.1/+8",
            "10.0.0.1/08",
            "fd00::1%eth0/64",
            "::1/129",
            "a;b/24",
            "-1/8",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        for bad in ["10.0.0.1/24", "fd00::1/64", "10.0.0.0", "0.0.0.1/0"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_that_no_guest_is_reached_at_is_told_from_one_that_is() {
        let is = |text: &str| text.parse::<Address>().unwrap().is_a_guest_s();
        for good in ["10.9.0.5/24", "10.9.0.255/16", "10.9.0.4/31", "10.9.0.4/32", "fd00::5/64", "fd00::/128"]
        {
            assert!(is(good), "{good}");
        }
        for bad in [
            "10.9.0.0/24",
            "10.9.0.255/24",
            "0.0.0.0/8",
            "127.0.0.1/8",
            "224.0.0.1/4",
            "169.254.1.1/16",
            "fe80::1/64",
            "::1/128",
            "fd00::/64",
            "10.0.0.1/0",
        ] {
            assert!(!is(bad), "{bad}");
        }
    }

    #[test]
    fn the_host_part_of_an_address_stands_in_the_other_subnet() {
        let (from, to) = (subnet("10.1.4.0/22"), subnet("172.16.8.0/22"));
        assert_eq!(from.lead("10.1.7.33".parse().unwrap(), &to), Some("172.16.11.33".parse().unwrap()));
        assert_eq!(from.lead("10.1.8.33".parse().unwrap(), &to), None, "another subnet's");
        assert_eq!(from.lead("10.1.7.33".parse().unwrap(), &subnet("172.16.0.0/16")), None);
        let (from, to) = (subnet("fd00:1::/64"), subnet("fd00:9::/64"));
        assert_eq!(from.lead("fd00:1::5:6".parse().unwrap(), &to), Some("fd00:9::5:6".parse().unwrap()));
        let all = subnet("0.0.0.0/0");
        assert_eq!(all.lead("1.2.3.4".parse().unwrap(), &all), Some("1.2.3.4".parse().unwrap()));
        assert!(all.meets(&subnet("10.0.0.0/8")) && !all.meets(&subnet("::/0")));
        assert!(!subnet("10.1.0.0/24").meets(&subnet("10.1.1.0/24")));
    }

    proptest! {
        #[test]
        fn an_address_led_there_and_back_is_what_it_was(ip in any::<u128>(), from in any::<u128>(), to in any::<u128>(), bits in 0u8..=128) {
            let net = |first: u128| Subnet { first: masked(IpAddr::V6(first.into()), bits), bits };
            let (from, to) = (net(from), net(to));
            let Subnet { first: IpAddr::V6(first), .. } = from else { panic!() };
            let ip = IpAddr::V6(Ipv6Addr::from_bits(first.to_bits() | (ip & !mask128(bits))));
            let led = from.lead(ip, &to).unwrap();
            prop_assert!(to.has(led));
            prop_assert_eq!(to.lead(led, &from), Some(ip));
        }

        #[test]
        fn what_is_read_prints_as_it_was_read_and_nothing_else_is_taken(text in "[0-9a-f.:/% -]{0,24}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
                prop_assert!(!address.to_string().starts_with('-') && !address.to_string().contains(' '));
            }
            let _ = (text.parse::<Mac>(), text.parse::<Subnet>());
        }
    }
}
