package probes

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// processesNamed returns the processes that go by a name a probe looks for, as
// they are now: the table shared by the probes may show the name and the state of
// an old process as they were some minutes ago. Where none is found and needed
// says that this would be told, all of them are read anew first, for one may have
// taken the name since.
func processesNamed(ctx context.Context, v host.View, named func(comm string) bool, needed bool) ([]host.Process, error) {
	procs, err := v.Processes(ctx)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range procs {
		if named(p.Comm) {
			pids = append(pids, p.PID)
		}
	}
	other := func(p host.Process) bool { return !named(p.Comm) }
	var found []host.Process
	if len(pids) > 0 {
		if found, err = v.ProcessesNow(ctx, pids...); err != nil {
			return nil, err
		}
		found = slices.DeleteFunc(found, other)
	}
	if len(found) == 0 && needed {
		all, err := v.ProcessesNow(ctx)
		if err != nil {
			return nil, err
		}
		found = slices.DeleteFunc(slices.Clone(all), other)
	}
	return found, nil
}

// ofTheHost leaves of the processes that go by a daemon's name those that can be
// the host's daemon. Any process of any pod may take any name. So root's
// count, and of these the ones in the network of PID 1, where the sockets of such
// daemons are: a pod is there, as root, only if it was allowed what makes it part
// of the host. What can not be seen counts for the process. What a process is in
// this is decided within a moment of its start, and asked again after seldomFor.
func ofTheHost(ctx context.Context, in Input, procs []host.Process) []host.Process {
	if len(procs) == 0 {
		return nil
	}
	const key = "processes of the host"
	known, _ := Kept[map[int]placedProcess](in.Memory, key)
	next := make(map[int]placedProcess, len(procs))
	kinds := []string{"net", "user"}
	var first []host.Link
	found := slices.DeleteFunc(slices.Clone(procs), func(p host.Process) bool {
		if p.Kernel || p.State == 'Z' || p.State == 'X' {
			return true
		}
		was, ok := known[p.PID]
		if !ok || was.start != p.StartTicks {
			was = placedProcess{start: p.StartTicks, first: in.Now}
		}
		if !ok || !elapsed(in.Now, was.first, placesItself) || elapsed(in.Now, was.at, seldomFor) {
			if first == nil {
				first = in.Host.ReadLinks(ctx, procFile(1, "ns"), kinds)
			}
			was.at = in.Now
			status, err := in.Host.ReadFile(ctx, procFile(p.PID, "status"))
			uid, known := effectiveUID(status)
			was.foreign = err == nil && known && uid != 0 || !sameNamespaces(in.Host.ReadLinks(ctx, procFile(p.PID, "ns"), kinds), first)
		}
		next[p.PID] = was
		return was.foreign
	})
	in.Memory.Keep(key, next)
	return found
}

// placedProcess is whether a process is another's than the host's, since when it
// is known and when that was looked at.
type placedProcess struct {
	start     uint64
	first, at time.Time
	foreign   bool
}

// placesItself is how long after it was first seen a daemon has given up the user
// and the namespaces it was started with.
const placesItself = 2 * time.Minute

// sharesWithInit reports whether a process is in PID 1's namespace of a kind, as
// far as that can be seen: a copied tree has none.
func sharesWithInit(ctx context.Context, v host.Files, pid int, kind string) bool {
	return sameNamespaces(v.ReadLinks(ctx, procFile(pid, "ns"), []string{kind}), v.ReadLinks(ctx, procFile(1, "ns"), []string{kind}))
}

func sameNamespaces(a, b []host.Link) bool {
	return slices.EqualFunc(a, b, func(a, b host.Link) bool { return a.Err != nil || b.Err != nil || a.Target == b.Target })
}

// effectiveUID is the second of the four numbers of Uid in proc_pid_status(5), in
// the user namespace of whoever reads it.
func effectiveUID(status []byte) (uid int, known bool) {
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte("Uid:")); ok {
			fields := bytes.Fields(rest)
			if len(fields) < 2 {
				return 0, false
			}
			n, err := strconv.ParseUint(string(fields[1]), 10, 32)
			return int(n), err == nil
		}
	}
	return 0, false
}
