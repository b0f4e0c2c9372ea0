package host

import (
	"strings"
	"time"
)

// Command is one of the few host commands the agent executes for reading. The
// argv is built here and nowhere else, so that this file is the complete list.
// A healthy idle pass executes none of them:
//
//	command          when
//	rpm -q           the rpm database file changed since the last answer
type Command struct {
	argv    []string
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
