package probes

import (
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// Wakes is what makes a probe look before its interval is over: events that the
// host announces and that may change the probe's answer. What is not announced
// is found at the interval. A probe names beside itself what is known before it
// looks; files it comes upon while it does are in [finding.Result.Follow].
type Wakes struct {
	// Units are systemd units, UnitFiles what is enabled and masked besides.
	Units     []string
	UnitFiles bool
	// Files whose content, or existence, is read.
	Files []host.FollowedFile
	// Mounts: the mount table.
	Mounts bool
	// Subsystems of devices that appear, change or go.
	Subsystems []string
	// ISCSI: what the kernel tells iscsid.
	ISCSI bool
	// Clock: steps of the system clock.
	Clock bool
	// KernelLog are words in lines of the kernel's log; WithoutKernelLog are the
	// files that are followed where it can not be read.
	KernelLog        []string
	WithoutKernelLog []host.FollowedFile
	// Processes are daemons by their comm, where there is no systemd to tell of
	// their units.
	Processes []string
	// After is how long the probe waits after an event because what it reads comes
	// about only then; 0 for not at all.
	After time.Duration
	// Again is how long after an event the probe looks once more, because what it
	// reads may follow the event with a delay; 0 for not at all.
	Again time.Duration
}

// followed makes a list of files of which any change matters.
func followed(names ...string) []host.FollowedFile {
	files := make([]host.FollowedFile, len(names))
	for i, n := range names {
		files[i] = host.FollowedFile{Name: n}
	}
	return files
}

// maxFollow limits how many files of one kind a probe follows: each costs an
// open descriptor and some kernel memory.
const maxFollow = 256
