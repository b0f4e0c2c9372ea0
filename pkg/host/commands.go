package host

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Command is one of the few host commands the agent executes for reading. The
// argv is built here and nowhere else, so that this file is the complete list.
// A healthy idle pass executes none of them:
//
//	command          when
//	rpm -q           the rpm database file changed since the last answer of its
//	                 kind: what is installed, when packages that need a reboot were
//	dry runs         a person asked for plan --simulate, or a repair is about
//	                 to run the same without the dry
//	journalctl       a repair has ended: its last lines
//	multipath -t     a repair wrote multipath configuration: does it parse
type Command struct {
	argv    []string
	env     []string
	timeout time.Duration
}

// String is the command as it would be typed.
func (c Command) String() string { return strings.Join(c.argv, " ") }

// Argv returns a copy of the argument vector.
func (c Command) Argv() []string { return append([]string(nil), c.argv...) }

// RPMQuery lists which of the named packages are installed, as
// NAME<TAB>EPOCH:VERSION-RELEASE<TAB>ARCH lines. Its exit code is the number of
// packages that are not. Names must not begin with '-'; that is the caller's
// validation to make, and "--" stands before them besides.
func RPMQuery(names ...string) Command {
	argv := append([]string{"/usr/bin/rpm", "-q", "--qf", `%{NAME}\t%{EVR}\t%{ARCH}\n`, "--"}, names...)
	return Command{argv: argv, timeout: 20 * time.Second}
}

// RPMWhatProvides lists the installed packages that provide a capability.
func RPMWhatProvides(names ...string) Command {
	argv := append([]string{"/usr/bin/rpm", "-q", "--whatprovides", "--qf", `%{NAME}\t%{EVR}\t%{ARCH}\n`, "--"}, names...)
	return Command{argv: argv, timeout: 20 * time.Second}
}

// RPMInstallTimes lists when the named packages were installed, as
// NAME<TAB>SECONDS lines.
func RPMInstallTimes(names ...string) Command {
	argv := append([]string{"/usr/bin/rpm", "-q", "--qf", `%{NAME}\t%{INSTALLTIME}\n`, "--"}, names...)
	return Command{argv: argv, timeout: 20 * time.Second}
}

// dryRunFlags turn a package manager's install into one that changes nothing.
var dryRunFlags = map[string]string{
	"/usr/bin/apt-get": "--simulate",
	"/usr/bin/dnf":     "--assumeno", "/usr/bin/yum": "--assumeno", "/usr/bin/microdnf": "--assumeno", "/usr/bin/tdnf": "--assumeno",
	"/usr/bin/zypper": "--dry-run",
}

// DryRun is a package manager's own simulation: one of the known programs with
// the flag that keeps it from changing anything.
func DryRun(argv, env []string) (Command, error) {
	flag, ok := "", len(argv) > 1
	if ok {
		flag, ok = dryRunFlags[argv[0]]
	}
	if !ok || !slices.Contains(argv, flag) {
		return Command{}, fmt.Errorf("%q is no dry run of a known package manager", strings.Join(argv, " "))
	}
	return Command{argv: slices.Clone(argv), env: slices.Clone(env), timeout: 5 * time.Minute}, nil
}

// JournalTail prints the last lines a unit wrote since a time, without their
// time stamps. --sync first has journald write what it was just given.
func JournalTail(unit string, since time.Time, lines int) []Command {
	return []Command{
		{argv: []string{"/usr/bin/journalctl", "--sync"}, timeout: 20 * time.Second},
		{argv: []string{"/usr/bin/journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=" + strconv.Itoa(lines),
			"--since=@" + strconv.FormatInt(since.Unix(), 10), "_SYSTEMD_UNIT=" + unit}, timeout: 20 * time.Second},
	}
}

// MultipathTest has multipath read its configuration; what it can not make sense
// of it names on standard error (multipath(8), -t).
func MultipathTest() Command {
	return Command{argv: []string{"/usr/sbin/multipath", "-t"}, timeout: 20 * time.Second}
}

// Env returns a copy of what the command finds in its environment besides PATH,
// HOME and LC_ALL.
func (c Command) Env() []string { return slices.Clone(c.env) }
