package remedy

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// Manager is how a host installs packages; "" where that is not known.
type Manager string

// The package managers.
const (
	Apt           Manager = "apt-get"
	Dnf           Manager = "dnf"
	Yum           Manager = "yum"
	Microdnf      Manager = "microdnf"
	Tdnf          Manager = "tdnf"
	Zypper        Manager = "zypper"
	Transactional Manager = "transactional-update"
)

// program is where the manager lies on the host.
func (m Manager) program() string {
	if m == Transactional {
		return "/usr/sbin/transactional-update"
	}
	return "/usr/bin/" + string(m)
}

// candidates are the managers a mutable system may have, the right one first.
// Each is an ordinary package on the other's systems too, so the distribution
// decides and not what is found.
func candidates(os host.OS) []Manager {
	ids := append([]string{os.ID}, os.IDLike...)
	has := func(names ...string) bool {
		return slices.ContainsFunc(ids, func(id string) bool { return slices.Contains(names, id) })
	}
	switch {
	case has("debian", "ubuntu"):
		return []Manager{Apt}
	case has("azurelinux", "mariner", "photon"):
		return []Manager{Tdnf, Dnf}
	case has("suse", "sles", "opensuse") || strings.HasPrefix(os.ID, "opensuse-"):
		return []Manager{Zypper}
	case has("rhel", "centos", "fedora", "rocky", "almalinux", "ol", "amzn", "openEuler", "anolis"):
		return []Manager{Dnf, Yum, Microdnf}
	}
	return []Manager{Apt, Dnf, Zypper, Tdnf, Yum, Microdnf}
}

// refusal says why nothing is installed on a class of system, and what its owner
// can do; "" when packages may be installed.
func refusal(os host.OS, mco bool, names []string) string {
	list := strings.Join(names, " ")
	switch how := probes.HowToBring(os, list); {
	case how == "":
		return ""
	case os.Class == host.OSTree && mco:
		return fmt.Sprintf("this node's system is managed by OpenShift's Machine Config Operator: bring %s as extensions of a MachineConfig or with a layered image", list)
	case os.Class == host.OSTree:
		return fmt.Sprintf("this system is managed by rpm-ostree (%s): %s", os.Why, how)
	default:
		return fmt.Sprintf("this system is image-based (%s) and takes no packages: %s", os.Why, how)
	}
}

const (
	// lockTimeout is how long apt waits for dpkg's locks on its own, besides the
	// agent's wait before it.
	lockTimeout = 120 * time.Second
	// packageLimit ends a transaction that hangs. A download over a slow mirror
	// and an initramfs on a slow disk take ten minutes; killing dpkg is worse
	// than waiting.
	packageLimit = 45 * time.Minute
	refreshLimit = 10 * time.Minute
	// listsMaxAge is how old apt's lists may be. The others refresh their own.
	listsMaxAge = 24 * time.Hour
)

// baseEnv is what every command of ours finds, whatever systemd would give.
func baseEnv() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}
}

// env keeps whatever could ask a question or restart a service from doing so.
func (m Manager) env() []string {
	switch m {
	case Apt:
		return []string{
			"DEBIAN_FRONTEND=noninteractive", "DEBCONF_NONINTERACTIVE_SEEN=true",
			"APT_LISTCHANGES_FRONTEND=none", "APT_LISTBUGS_FRONTEND=none",
			// needrestart(1) is a hook of apt that restarts services, multipathd
			// among them.
			"NEEDRESTART_SUSPEND=1", "NEEDRESTART_MODE=l",
			"UCF_FORCE_CONFFOLD=1",
		}
	case Zypper, Transactional:
		return []string{fmt.Sprintf("ZYPP_LOCK_TIMEOUT=%d", int(lockTimeout.Seconds()))}
	}
	return nil
}

// dpkgOptions keep the configuration files an operator has changed.
func dpkgOptions() []string {
	return []string{"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"}
}

// installArgv is one transaction that adds packages and changes no other.
// Nothing recommended comes along: on a node, what was not asked for is a
// service more to look after.
func (m Manager) installArgv(names []string) []string {
	argv := []string{m.program()}
	switch m {
	case Apt:
		argv = append(argv, "install", "--yes", "--no-install-recommends", "--no-upgrade", "--no-remove",
			"-o", fmt.Sprintf("DPkg::Lock::Timeout=%d", int(lockTimeout.Seconds())))
		argv = append(argv, dpkgOptions()...)
		argv = append(argv, "--")
	case Dnf:
		argv = append(argv, "install", "--assumeyes", "--setopt=install_weak_deps=False")
	case Yum:
		argv = append(argv, "install", "--assumeyes")
	case Microdnf:
		argv = append(argv, "install", "--assumeyes", "--setopt=install_weak_deps=0")
	case Tdnf:
		argv = append(argv, "install", "--assumeyes")
	case Zypper:
		argv = append(argv, "--non-interactive", "install", "--no-recommends", "--no-force-resolution", "--")
	case Transactional:
		// --continue stages on top of what already waits for the reboot.
		argv = append(argv, "--non-interactive", "--continue", "pkg", "install", "--no-recommends", "--no-force-resolution")
	}
	return append(argv, names...)
}

// simulateArgv is the dry run of installArgv.
func (m Manager) simulateArgv(names []string) []string {
	switch m {
	case Apt:
		// Else apt would write a new cache and a log on the host.
		argv := []string{m.program(), "install", "--simulate", "--no-install-recommends", "--no-upgrade",
			"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "Dir::Log::Planner=", "-o", "Debug::NoLocking=true", "--"}
		return append(argv, names...)
	case Zypper, Transactional:
		argv := []string{Zypper.program(), "--non-interactive", "--xmlout", "install", "--dry-run", "--no-recommends", "--no-force-resolution", "--"}
		return append(argv, names...)
	}
	argv := m.installArgv(names)
	return append([]string{argv[0], argv[1], "--assumeno"}, slices.DeleteFunc(slices.Clone(argv[2:]), func(a string) bool { return a == "--assumeyes" })...)
}

// simulateEnv keeps the dry run from leaving a log behind.
func (m Manager) simulateEnv() []string {
	if m == Zypper || m == Transactional {
		return append(m.env(), "ZYPP_LOGFILE=/dev/null")
	}
	return m.env()
}

// refreshArgv reads the repositories' lists anew; only apt does not by itself.
func (m Manager) refreshArgv() []string {
	if m == Apt {
		return []string{m.program(), "update", "-o", fmt.Sprintf("DPkg::Lock::Timeout=%d", int(lockTimeout.Seconds()))}
	}
	return nil
}

// removeHint is what a person would type to take packages away again. The agent
// does not: volumes may have come to depend on them.
func (m Manager) removeHint(names []string) string {
	switch m {
	case Transactional:
		return "transactional-update pkg remove " + strings.Join(names, " ")
	case "":
		return "remove " + strings.Join(names, " ")
	}
	return path.Base(m.program()) + " remove " + strings.Join(names, " ")
}

// configureArgv lets dpkg finish what was interrupted.
func configureArgv() []string {
	return []string{"/usr/bin/dpkg", "--force-confdef", "--force-confold", "--configure", "-a"}
}

// lockFile is a lock a manager needs: a record lock, or a file with a PID.
type lockFile struct {
	path string
	pid  bool
}

// locks in the order they are taken.
func (m Manager) locks() []lockFile {
	switch m {
	case Apt:
		return []lockFile{{path: "/var/lib/dpkg/lock-frontend"}, {path: "/var/lib/dpkg/lock"}, {path: "/var/cache/apt/archives/lock"}, {path: "/var/lib/apt/lists/lock"}}
	case Dnf, Yum, Microdnf, Tdnf:
		return []lockFile{
			{path: "/var/lib/rpm/.rpm.lock"}, {path: "/usr/lib/sysimage/rpm/.rpm.lock"},
			{path: "/var/lib/dnf/rpmdb_lock.pid", pid: true}, {path: "/var/cache/dnf/metadata_lock.pid", pid: true},
			{path: "/var/run/yum.pid", pid: true}, {path: "/var/run/.tdnf-instance-lockfile"},
		}
	case Zypper, Transactional:
		return []lockFile{
			{path: "/run/zypp.pid", pid: true}, {path: "/var/lib/rpm/.rpm.lock"}, {path: "/usr/lib/sysimage/rpm/.rpm.lock"},
			{path: "/var/run/transactional-update.lock"},
		}
	}
	return nil
}

// busyExit tells an exit code that only says that somebody else was quicker to
// the lock.
func (m Manager) busyExit(code int, output []string) bool {
	switch m {
	case Apt:
		return code == 100 && slices.ContainsFunc(output, func(l string) bool { return strings.HasPrefix(l, "E: Could not get lock ") })
	case Zypper: // ZYPPER_EXIT_ZYPP_LOCKED, zypper(8)
		return code == 7
	}
	return false
}
