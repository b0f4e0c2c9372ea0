package probes

import (
	"context"
	"slices"

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
