//! [`Machine`]: what a figure was measured on. Every result file carries it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use kavanam_kernels::Isa;
use serde::{Deserialize, Serialize};

/// The CPU flags that kernels of this project can use, as `/proc/cpuinfo` spells them.
const FLAGS: [&str; 17] = [
    "fma",
    "f16c",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
];

/// A machine and the program that ran on it. Nothing in it identifies a person or a host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// The CPU's model name.
    pub(crate) cpu: String,
    /// The architecture that the program was compiled for.
    pub(crate) arch: String,
    /// How many cores the process may use.
    pub(crate) cores: usize,
    /// The CPU flags that matter to kernels.
    pub(crate) flags: Vec<String>,
    /// The instruction sets that kernels can be run with.
    pub(crate) isas: Vec<String>,
    /// The caches that core 0 sees, from the nearest.
    pub(crate) caches: Vec<Cache>,
    /// The memory in bytes, 0 when it is unknown.
    pub(crate) memory_bytes: u64,
    /// The frequency governor, `unknown` where the system does not tell (most virtual machines).
    pub(crate) governor: String,
    /// Operating system and kernel release.
    pub(crate) os: String,
    /// The compiler that built the program.
    pub(crate) rustc: String,
    /// The commit that it was built from.
    pub(crate) commit: String,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cache {
    /// `L1d`, `L1i`, `L2`, `L3`.
    pub(crate) name: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// How many CPUs share it.
    pub(crate) shared_by: usize,
}

impl Machine {
    /// Asks the system; what it does not tell is `unknown` or empty.
    pub(crate) fn detect() -> Machine {
        let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpuinfo = cpuinfo(&text);
        let field = |names: &[&str]| names.iter().find_map(|name| cpuinfo.get(*name)).cloned();
        let present = field(&["flags", "Features"]).unwrap_or_default();
        let present: Vec<&str> = present.split_whitespace().collect();
        Machine {
            cpu: field(&["model name", "Model", "Processor"]).unwrap_or_else(|| "unknown".into()),
            arch: std::env::consts::ARCH.into(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            flags: FLAGS.iter().filter(|flag| present.contains(flag)).map(|&flag| flag.into()).collect(),
            isas: Isa::available().iter().map(|isa| isa.name().to_string()).collect(),
            caches: caches(),
            memory_bytes: memory_bytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
            governor: line_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            os: format!("{} {}", std::env::consts::OS, line_of("/proc/sys/kernel/osrelease")),
            rustc: env!("KAVANAM_RUSTC").into(),
            commit: env!("KAVANAM_COMMIT").into(),
        }
    }

    /// Key and value of everything, for people: the lines of `environment.txt`.
    pub(crate) fn fields(&self) -> Vec<(String, String)> {
        let caches: Vec<String> = self.caches.iter().map(Cache::to_string).collect();
        let memory = match self.memory_bytes {
            0 => "unknown".to_owned(),
            bytes => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
        };
        let fields = [
            ("cpu", format!("{} ({}), {} cores", self.cpu, self.arch, self.cores)),
            ("isas", self.isas.join(", ")),
            ("flags", self.flags.join(" ")),
            ("caches", caches.join(", ")),
            ("memory", memory),
            ("governor", self.governor.clone()),
            ("system", self.os.clone()),
            ("compiler", self.rustc.clone()),
            ("commit", self.commit.clone()),
        ];
        fields.map(|(key, value)| (key.to_owned(), value)).into()
    }

    /// The CPU's name as a folder name: lower case, hyphens, the cores at the end.
    pub(crate) fn slug(&self) -> String {
        let mut slug = String::new();
        for c in self.cpu.to_lowercase().replace("(r)", "").replace("(tm)", "").chars() {
            match c {
                'a'..='z' | '0'..='9' | '.' => slug.push(c),
                _ if slug.is_empty() || slug.ends_with('-') => {}
                _ => slug.push('-'),
            }
        }
        format!("{}-{}-cores", slug.trim_end_matches(['-', '.']), self.cores)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fields().iter().try_for_each(|(key, value)| writeln!(f, "{key:<9} {value}"))
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, unit) =
            if self.bytes >= 1 << 20 { (self.bytes >> 20, "MiB") } else { (self.bytes >> 10, "KiB") };
        write!(f, "{} {size} {unit}", self.name)?;
        if self.shared_by > 1 { write!(f, " (shared by {})", self.shared_by) } else { Ok(()) }
    }
}

/// The fields of the first processor in the text of `/proc/cpuinfo`.
fn cpuinfo(text: &str) -> BTreeMap<&str, String> {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let mut first = BTreeMap::new();
    for (key, value) in fields {
        first.entry(key.trim()).or_insert_with(|| value.trim().to_owned());
    }
    first
}

/// `MemTotal` in the text of `/proc/meminfo`.
fn memory_bytes(text: &str) -> u64 {
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib << 10)
}

/// The caches of CPU 0, as Linux lists them.
fn caches() -> Vec<Cache> {
    (0..)
        .map(|index| format!("/sys/devices/system/cpu/cpu0/cache/index{index}"))
        .map_while(|dir| {
            let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).ok();
            let (level, kind, size) = (read("level")?, read("type")?, read("size")?);
            let suffix = match kind.trim() {
                "Data" => "d",
                "Instruction" => "i",
                _ => "",
            };
            Some(Cache {
                name: format!("L{}{suffix}", level.trim()),
                bytes: cache_bytes(size.trim())?,
                shared_by: read("shared_cpu_list").map_or(1, |list| count_cpus(list.trim())),
            })
        })
        .collect()
}

/// `32K`, `8M` in bytes.
fn cache_bytes(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(['K', 'M']);
    let factor = if size.ends_with('M') { 1 << 20 } else { 1 << 10 };
    digits.parse::<u64>().ok().map(|n| n * factor)
}

/// How many CPUs `0-3,8` names.
fn count_cpus(list: &str) -> usize {
    let of_range = |range: &str| -> Option<usize> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<usize>().ok()?.checked_sub(first.parse::<usize>().ok()?).map(|n| n + 1)
    };
    list.split(',').filter_map(of_range).sum::<usize>().max(1)
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_round_trips() {
        let machine = Machine::detect();
        assert!(machine.cores >= 1 && machine.isas.contains(&"scalar".to_owned()));
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
        assert!(machine.to_string().contains(&machine.cpu));
    }

    #[test]
    fn a_slug_is_a_folder_name() {
        let cpu = "Intel(R) Xeon(R) Platinum 8480+ @ 2.0GHz".into();
        let machine = Machine { cpu, cores: 2, ..Machine::default() };
        assert_eq!(machine.slug(), "intel-xeon-platinum-8480-2.0ghz-2-cores");
    }

    #[test]
    fn system_files_are_understood() {
        assert_eq!(cpuinfo("model name\t: A\nflags\t: fma\n\nmodel name\t: B\n")["model name"], "A");
        assert_eq!(memory_bytes("MemFree: 1 kB\nMemTotal:       16 kB\n"), 16 << 10);
        assert_eq!(cache_bytes("32K"), Some(32 << 10));
        assert_eq!(cache_bytes("8M"), Some(8 << 20));
        assert_eq!(count_cpus("0-3,8"), 5);
        assert_eq!(count_cpus("0"), 1);
    }
}
