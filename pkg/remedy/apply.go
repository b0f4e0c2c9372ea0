package remedy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Changer is what an [Applier] does to the host; [host.Changer] implements it.
type Changer interface {
	Snapshot(ctx context.Context, name string) (host.FileContent, error)
	WriteFile(ctx context.Context, name string, f host.FileContent) error
	CreateFile(ctx context.Context, name string, f host.FileContent) error
	RemoveFile(ctx context.Context, name string) error
	MakeDirs(ctx context.Context, name string, perm fs.FileMode) ([]string, error)
	RemoveDir(ctx context.Context, name string) error

	StartJob(ctx context.Context, j host.Job) error
	Job(ctx context.Context, name string) (host.JobState, error)
	Jobs(ctx context.Context) ([]host.JobState, error)
	CollectJob(ctx context.Context, name string) error

	EnableUnit(ctx context.Context, name string) error
	DisableUnit(ctx context.Context, name string) error
	UnmaskUnit(ctx context.Context, name string) error
	MaskUnit(ctx context.Context, name string) error
	StartUnit(ctx context.Context, name string) error
	StopUnit(ctx context.Context, name string) error
	ReloadUnit(ctx context.Context, name string) error
	ReloadSystemd(ctx context.Context) error

	SetSysctl(ctx context.Context, name, value string) (before string, err error)
	SetOOMScore(ctx context.Context, pid int, startTicks uint64, score int) (before int, err error)

	Record(ctx context.Context, message string, fields map[string]string) error
}

// Permit is asked before each step. It returns when the step may begin, and what
// gives the permission back; an error says why it may not. A daemon's keeps the
// maintenance window, the number of nodes that change at a time and the fleet's
// stop; `agent apply` needs none. The permission must last for the deadline,
// because a job outlives the agent that began it; release is told whether one
// still runs, and must not give the permission back then.
type Permit func(ctx context.Context, step Step, deadline time.Duration) (release func(running bool), err error)

// Deadline is how long a step may take at the most, its waiting for locks
// included: what a gate must hold its permission for.
func (s Step) Deadline() time.Duration {
	d := 2 * time.Minute
	for _, c := range s.Commands {
		d += time.Duration(c.LimitSeconds)*time.Second + 3*time.Minute // and to end
	}
	if s.manager != "" {
		d += lockWait + simulateLimit
	}
	return d
}

const (
	// lockWait is how long somebody else may hold the package manager's lock;
	// an unattended upgrade of a slow node takes about that.
	lockWait      = 15 * time.Minute
	simulateLimit = 5 * time.Minute
	unitLimit     = 90 * time.Second
	outputLines   = 40
)

// Applier carries out steps.
type Applier struct {
	View    host.View
	Changer Changer
	Log     *slog.Logger
	// Permit is asked before each step; nil lets every step through.
	Permit Permit
	// Told hears what became of each step; nil for nobody.
	Told func(Result)
	// LockWait is how long to wait for the package manager's lock; 0 means 15
	// minutes.
	LockWait time.Duration
	// Poll is how often a job is looked at; 0 means every half second.
	Poll time.Duration
}

// Apply carries out a plan's pending steps and returns what became of each. A
// step whose precondition failed is skipped; the others go on. The error is
// about what stops everything: the state that can not be written.
func (a *Applier) Apply(ctx context.Context, plan Plan, facts Facts) (*Record, error) {
	if len(plan.Pending()) == 0 {
		return &Record{ID: plan.ID}, nil
	}
	st, err := openStore(ctx, a.Changer, plan.ID, time.Now())
	if err != nil {
		return nil, err
	}
	bad := map[string]bool{}
	for _, s := range plan.Steps {
		if s.Refused != "" {
			bad[s.ID] = true
			continue
		}
		r := &run{Applier: a, store: st, step: s, facts: facts}
		if i := slices.IndexFunc(s.DependsOn, func(id string) bool { return bad[id] }); i >= 0 {
			r.begin()
			r.end(ctx, Skipped, fmt.Errorf("it needs the step %s, which was not done", s.DependsOn[i]))
			bad[s.ID] = true
			continue
		}
		if err := r.do(ctx); err != nil {
			return &st.record, err
		}
		if o := r.result().Outcome; o != Applied && o != Staged {
			bad[s.ID] = true
		}
		if ctx.Err() != nil {
			return &st.record, ctx.Err()
		}
	}
	return &st.record, nil
}

// run is one step being carried out.
type run struct {
	*Applier
	store *store
	step  Step
	facts Facts
	index int
}

func (r *run) result() *Result { return &r.store.record.Results[r.index] }

func (r *run) begin() {
	s := r.step
	r.index = len(r.store.record.Results)
	r.store.record.Results = append(r.store.record.Results, Result{
		Step: s.ID, Digest: s.Digest(), Kind: s.Kind, Actions: s.Actions, Subjects: s.Subjects, Why: s.Why,
		Outcome: Started, Started: time.Now().UTC(), BootID: r.facts.OS.BootID,
	})
}

// end notes what became of the step, in the state, the log and the journal.
func (r *run) end(ctx context.Context, o Outcome, err error) error {
	res := r.result()
	res.Outcome, res.Ended = o, time.Now().UTC()
	if err != nil {
		res.Message = err.Error()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	r.audit(ctx, *res)
	return r.store.save(ctx)
}

func (a *Applier) audit(ctx context.Context, res Result) {
	if a.Told != nil {
		a.Told(res)
	}
	message := fmt.Sprintf("%s: %s %s", res.Outcome, strings.Join(res.Actions, " and "), strings.Join(res.Subjects, ", "))
	if res.Message != "" {
		message += ": " + res.Message
	}
	before, after := res.beforeAfter()
	a.Log.Info("remedy", "step", res.Step, "outcome", res.Outcome, "subjects", res.Subjects, "message", res.Message, "before", before, "after", after)
	if err := a.Changer.Record(ctx, message, map[string]string{"STEP": res.Step, "OUTCOME": string(res.Outcome), "BEFORE": before, "AFTER": after}); err != nil {
		a.Log.Warn("the host's journal did not take the record of a repair", "step", res.Step, "err", err)
	}
}

func (res Result) beforeAfter() (before, after string) {
	var b, f []string
	for _, c := range res.Changes {
		switch c.What {
		case "file":
			was := "absent"
			if c.Existed {
				was = "kept in " + c.Backup
			}
			b, f = append(b, c.Name+" "+was), append(f, c.Name+" sha256:"+c.SHA256)
		case "sysctl", "score":
			b, f = append(b, c.Name+"="+c.Before), append(f, c.Name+"="+c.After)
		case "unit":
			f = append(f, c.Name+" "+c.Do)
		case "packages":
			f = append(f, "installed "+strings.Join(c.Packages, " "))
		case "module":
			f = append(f, c.Name+" loaded")
		}
	}
	return strings.Join(b, "; "), strings.Join(f, "; ")
}

// do carries out the step. Its own failure is in the result; the error is one
// that must stop the plan.
func (r *run) do(ctx context.Context) error {
	r.begin()
	s := r.step
	if r.Permit != nil {
		release, err := r.Permit(ctx, s, s.Deadline())
		if err != nil {
			return r.end(ctx, Skipped, err)
		}
		defer func() { release(r.result().Outcome == Started) }()
	}
	ctx, cancel := context.WithTimeout(ctx, s.Deadline())
	defer cancel()
	if err := r.store.save(ctx); err != nil {
		return err
	}
	err := r.files(ctx)
	if err == nil && len(s.Commands) > 0 {
		err = r.commands(ctx)
	}
	if err == nil && s.Sysctl != nil {
		err = r.sysctl(ctx)
	}
	if err == nil {
		err = r.units(ctx)
	}
	if err == nil && s.OOMScore != nil {
		err = r.score(ctx)
	}
	switch {
	case errors.Is(err, errStopped):
		// The job goes on without this agent; the next one follows it.
		return r.end(ctx, Started, err)
	case err != nil:
		res := r.result()
		if left := r.undo(context.WithoutCancel(ctx), res.Changes); len(left) > 0 {
			err = fmt.Errorf("%w; not taken back: %s", err, strings.Join(left, "; "))
		}
		if errors.Is(err, context.Canceled) {
			// The agent was told to end before anything ran: nothing has failed.
			return r.end(ctx, Skipped, err)
		}
		return r.end(ctx, Failed, err)
	case s.AfterReboot:
		return r.end(ctx, Staged, nil)
	}
	return r.end(ctx, Applied, nil)
}

// change puts a change on record and then makes it.
func (r *run) change(ctx context.Context, c Change, f func() error) error {
	res := r.result()
	res.Changes = append(res.Changes, c)
	if err := r.store.save(ctx); err != nil {
		return err
	}
	if err := f(); err != nil {
		// It may have been made all the same; undoing looks before it acts.
		return err
	}
	return nil
}

// files writes the step's files, each kept before, and has them validated.
func (r *run) files(ctx context.Context) error {
	for _, f := range r.step.Files {
		if err := r.file(ctx, f); err != nil {
			return err
		}
	}
	return r.validate(ctx)
}

func (r *run) file(ctx context.Context, f FileChange) error {
	now, err := r.Changer.Snapshot(ctx, f.Path)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// What was planned holds for the file as it was then.
	switch {
	case f.Create && exists:
		return fmt.Errorf("%s has appeared since the plan was made: it is not overwritten", f.Path)
	case !f.Create && (!exists || string(now.Data) != f.before):
		return fmt.Errorf("%s has changed since the plan was made: it is not overwritten", f.Path)
	}
	text := f.after
	if f.random {
		text = "InitiatorName=" + initiatorName(r.facts.OS.ID) + "\n"
	}
	want := host.FileContent{Data: []byte(text), Mode: f.mode, UID: f.uid, GID: f.gid, Label: now.Label}
	if made, err := r.Changer.MakeDirs(ctx, path.Dir(f.Path), 0o755); err != nil {
		return err
	} else if len(made) > 0 {
		for _, dir := range made {
			r.result().Changes = append(r.result().Changes, Change{What: "directory", Name: dir})
		}
	}
	c := Change{What: "file", Name: f.Path, SHA256: hash(want.Data)}
	write := r.Changer.CreateFile
	if exists {
		if c.Backup, err = r.store.backup(ctx, now); err != nil {
			return fmt.Errorf("what %s was could not be kept, so it was not changed: %w", f.Path, err)
		}
		c.Existed, c.Mode, c.UID, c.GID, c.Label = true, uint32(now.Mode), now.UID, now.GID, now.Label
		write = r.Changer.WriteFile
	}
	return r.change(ctx, c, func() error { return write(ctx, f.Path, want) })
}

// validate has multipath read what was written, where there is a multipath.
func (r *run) validate(ctx context.Context) error {
	for _, f := range r.step.Files {
		if !isMultipathConfig(f.Path) {
			continue
		}
		test := host.MultipathTest()
		if _, err := r.View.Stat(ctx, test.Argv()[0]); errors.Is(err, fs.ErrNotExist) {
			continue // checked by its syntax; the package comes later
		}
		out, err := r.View.Run(ctx, test)
		if err != nil {
			return fmt.Errorf("whether %s is understood could not be tested: %w", f.Path, err)
		}
		if bad := multipathComplaints(out.Stderr, f.Path); len(bad) > 0 || out.Code != 0 {
			r.result().Output = bad
			return fmt.Errorf("multipath does not understand %s (exit %d): %s", f.Path, out.Code, strings.Join(bad, "; "))
		}
	}
	return nil
}

func (r *run) sysctl(ctx context.Context) error {
	c := r.step.Sysctl
	data, err := r.View.ReadFile(ctx, host.SysctlPath(c.Name))
	if err != nil {
		return err
	}
	before := strings.TrimSpace(string(data))
	return r.change(ctx, Change{What: "sysctl", Name: c.Name, Before: before, After: c.Value}, func() error {
		_, err := r.Changer.SetSysctl(ctx, c.Name, c.Value)
		return err
	})
}

func (r *run) units(ctx context.Context) error {
	for _, u := range r.step.Units {
		if err := r.unit(ctx, u); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) unit(ctx context.Context, u UnitChange) error {
	ctx, cancel := context.WithTimeout(ctx, unitLimit)
	defer cancel()
	c := Change{What: "unit", Name: u.Unit, Do: u.Do}
	switch u.Do {
	case "daemon-reload":
		return r.Changer.ReloadSystemd(ctx)
	case "reload":
		return r.Changer.ReloadUnit(ctx, u.Unit)
	case "enable":
		return r.change(ctx, c, func() error { return r.Changer.EnableUnit(ctx, u.Unit) })
	case "unmask":
		return r.change(ctx, c, func() error { return r.Changer.UnmaskUnit(ctx, u.Unit) })
	case "start":
		now, err := r.View.Units(ctx, u.Unit)
		if err != nil {
			return err
		}
		if now[0].Running() {
			return nil
		}
		return r.change(ctx, c, func() error { return r.Changer.StartUnit(ctx, u.Unit) })
	}
	return fmt.Errorf("nobody knows how to %q a unit", u.Do)
}

func (r *run) score(ctx context.Context) error {
	c := r.step.OOMScore
	units, err := r.View.Units(ctx, c.Unit)
	if err != nil {
		return err
	}
	pid := units[0].MainPID
	if pid == 0 {
		return fmt.Errorf("%s has no main process", c.Unit)
	}
	procs, err := r.View.Processes(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(procs, func(p host.Process) bool { return p.PID == pid })
	if i < 0 {
		return fmt.Errorf("the main process of %s has just ended", c.Unit)
	}
	data, err := r.View.ReadFile(ctx, path.Join("/proc", strconv.Itoa(pid), "oom_score_adj"))
	if err != nil {
		return err
	}
	change := Change{What: "score", Name: c.Unit, PID: pid, Start: procs[i].StartTicks, Before: strings.TrimSpace(string(data)), After: strconv.Itoa(c.Score)}
	return r.change(ctx, change, func() error {
		_, err := r.Changer.SetOOMScore(ctx, pid, procs[i].StartTicks, c.Score)
		return err
	})
}

// commands runs the step's commands one after the other, a package transaction
// only after its own dry run.
func (r *run) commands(ctx context.Context) error {
	for _, c := range r.step.Commands {
		name := host.JobPrefix + r.step.ID
		if c.Prepares {
			name += "-prepare"
		}
		following, err := r.pickUp(ctx, name, c)
		if err != nil {
			return err
		}
		if !following {
			if r.step.manager != "" {
				if err := r.awaitLocks(ctx, c); err != nil {
					return err
				}
			}
			if len(r.step.requests) > 0 && !c.Prepares {
				if err := r.simulate(ctx); err != nil {
					return err
				}
			}
		}
		if err := r.command(ctx, name, c, following); err != nil {
			return err
		}
	}
	return r.done(ctx)
}

// done notes what came with the commands.
func (r *run) done(ctx context.Context) error {
	res := r.result()
	switch {
	case len(r.step.requests) > 0:
		res.Changes = append(res.Changes, Change{What: "packages", Name: strings.Join(r.step.requests, " "), Packages: r.step.requests, Hint: r.step.manager.removeHint(r.step.requests)})
	case r.step.Kind == finding.KindModules:
		res.Changes = append(res.Changes, Change{What: "module", Name: r.step.Subjects[0]})
	}
	if r.step.AfterReboot {
		return r.handOverReboot(ctx)
	}
	return nil
}

// handOverReboot leaves the note that kured and others look for (Debian policy
// of update-notifier; kured's --reboot-sentinel). The agent never reboots.
func (r *run) handOverReboot(ctx context.Context) error {
	for name, text := range map[string]string{
		rebootFile:           "*** System restart required ***\n",
		rebootFile + ".pkgs": strings.Join(r.step.requests, "\n") + "\n",
	} {
		now, err := r.Changer.Snapshot(ctx, name)
		if err == nil && name == rebootFile {
			continue
		}
		if err := r.Changer.WriteFile(ctx, name, host.FileContent{Data: append(now.Data, text...), Mode: 0o644}); err != nil {
			return fmt.Errorf("the packages are staged, and the note that a reboot is needed could not be written: %w", err)
		}
	}
	return nil
}

// awaitLocks waits until nobody works with the package manager, and says who
// does when that takes too long.
func (r *run) awaitLocks(ctx context.Context, c Command) error {
	wait := r.LockWait
	if wait == 0 {
		wait = lockWait
	}
	told := ""
	for deadline := time.Now().Add(wait); ; {
		holder := r.lockHolder(ctx)
		if holder == "" {
			return nil
		}
		if holder != told {
			r.Log.Info("waiting for the package manager's lock", "holder", holder, "step", r.step.ID)
			told = holder
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s for %s already, so nothing could be installed", holder, wait)
		}
		if err := r.pause(ctx); err != nil {
			return err
		}
	}
}

// errStopped: the agent is told to end while a job runs.
var errStopped = errors.New("the agent was stopped while this was going on")

func (a *Applier) pause(ctx context.Context) error {
	d := a.Poll
	if d == 0 {
		d = 500 * time.Millisecond
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// lockHolder names who holds one of the manager's locks, "" when nobody does.
func (r *run) lockHolder(ctx context.Context) string {
	for _, l := range r.step.manager.locks() {
		pid := 0
		if l.pid {
			data, err := r.View.ReadFile(ctx, l.path)
			if err != nil {
				continue
			}
			if pid, err = strconv.Atoi(strings.TrimSpace(string(data))); err != nil || pid <= 0 {
				continue
			}
			// A PID file may outlive its writer.
			if _, err := r.View.Lstat(ctx, fmt.Sprintf("/proc/%d", pid)); err != nil {
				continue
			}
		} else {
			held, err := r.View.LockHolder(ctx, l.path)
			if err != nil || !held.Held {
				continue
			}
			pid = held.PID
		}
		return fmt.Sprintf("%s holds %s", r.processName(ctx, pid), l.path)
	}
	return ""
}

func (r *run) processName(ctx context.Context, pid int) string {
	if pid <= 0 {
		return "a process the kernel does not name"
	}
	comm, err := r.View.ReadFile(ctx, fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	return fmt.Sprintf("%q (PID %d)", strings.TrimSpace(string(comm)), pid)
}

// Simulate has the package manager itself say what a step would do. It changes
// nothing on the host.
func (s *Step) Simulate(ctx context.Context, view host.View) error {
	if len(s.requests) == 0 || s.manager == "" {
		return nil
	}
	cmd, err := host.DryRun(s.manager.simulateArgv(s.requests), append(baseEnv(), s.manager.simulateEnv()...))
	if err != nil {
		return err
	}
	out, err := view.Run(ctx, cmd)
	if err != nil {
		return err
	}
	lines := lastLines(append(slices.Clone(out.Stdout), out.Stderr...), outputLines)
	t, perr := s.manager.parseSimulation(out.Stdout)
	// --assumeno ends with 1 after it has shown all of it.
	declined := out.Code == 1 && slices.Contains(cmd.Argv(), "--assumeno") && perr == nil
	if out.Code != 0 && !declined {
		return &CommandError{Argv: cmd.Argv(), Code: out.Code, Output: lines}
	}
	if perr != nil {
		return &CommandError{Argv: cmd.Argv(), Code: out.Code, Output: lines, Why: perr}
	}
	s.Transaction = &t
	s.Simulation = "would install " + orNothing(t.Install)
	if why := t.Refusal(s.requests); why != "" {
		s.Simulation = why
		s.refuse("%s", why)
	}
	return nil
}

func (r *run) simulate(ctx context.Context) error {
	s := r.step
	if err := s.Simulate(ctx, r.View); err != nil {
		var ce *CommandError
		if errors.As(err, &ce) {
			r.result().Output = ce.Output
		}
		return fmt.Errorf("the dry run failed, so nothing was installed: %w", err)
	}
	if s.Refused != "" {
		return errors.New(s.Refused)
	}
	return nil
}

// CommandError is a command that failed, with its own last words.
type CommandError struct {
	Argv   []string
	Code   int
	Output []string
	Why    error
}

func (e *CommandError) Error() string {
	text := "it"
	if len(e.Argv) > 0 {
		text = path.Base(e.Argv[0])
	}
	if words := lastWords(e.Output); words != "" {
		text += " says: " + words
	} else {
		text += " failed without a word"
	}
	if e.Why != nil {
		return fmt.Sprintf("%s (%v)", text, e.Why)
	}
	return fmt.Sprintf("%s (exit %d)", text, e.Code)
}

// lastWords picks the lines that say what is wrong, or else the last ones.
func lastWords(lines []string) string {
	var bad []string
	for _, l := range lines {
		low := strings.ToLower(l)
		if strings.HasPrefix(l, "E: ") || strings.Contains(low, "error") || strings.Contains(low, "no match") || strings.Contains(low, "not found") || strings.Contains(low, "no provider") {
			bad = append(bad, l)
		}
	}
	if len(bad) == 0 {
		bad = lines
	}
	return strings.Join(bad[max(0, len(bad)-3):], " / ")
}

// lastLines cuts a program's output into lines, without progress that was
// painted over.
func lastLines(out []byte, n int) []string {
	var lines []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\r\n")
		if i := strings.LastIndexByte(line, '\r'); i >= 0 {
			line = line[i+1:]
		}
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines[max(0, len(lines)-n):]
}

// pickUp looks for a job of the same name. One that runs the same is followed,
// as is one that has ended but that nobody has collected; one that runs
// something else is waited for.
func (r *run) pickUp(ctx context.Context, name string, c Command) (following bool, err error) {
	for {
		j, err := r.Changer.Job(ctx, name)
		if err != nil {
			return false, err
		}
		switch {
		case !j.Found:
			return false, nil
		case slices.Equal(j.Argv, c.Argv) && j.Running:
			r.Log.Info("following a job that was begun before", "job", name)
			return true, nil
		case !j.Running:
			// Whatever it was, the findings say that it is still needed.
			if err := r.Changer.CollectJob(ctx, name); err != nil {
				return false, err
			}
		default:
			if err := r.pause(ctx); err != nil {
				return false, fmt.Errorf("%s runs something else (%s): %w", name, strings.Join(j.Argv, " "), err)
			}
		}
	}
}

// command runs one command as a job and waits for its end. A manager that found
// its lock taken meanwhile is tried again while there is time.
func (r *run) command(ctx context.Context, name string, c Command, following bool) error {
	for {
		if !following {
			job := host.Job{Name: name, Description: "host-hygiene " + r.step.ID + ": " + strings.Join(r.step.Subjects, " "), Argv: c.Argv, Env: c.Env, Limit: time.Duration(c.LimitSeconds) * time.Second}
			if err := r.Changer.StartJob(ctx, job); err != nil && !errors.Is(err, host.ErrJobExists) {
				return err
			}
		}
		following = false
		j, err := r.follow(ctx, name)
		if err != nil {
			return err
		}
		output := r.output(ctx, j)
		if err := r.Changer.CollectJob(ctx, name); err != nil {
			r.Log.Warn("a job that has ended could not be collected", "job", name, "err", err)
		}
		// Kept also when all seems well: the next check may say otherwise.
		r.result().Output = output
		if j.Result == "success" && j.Code == 0 {
			return nil
		}
		if r.step.manager.busyExit(j.Code, output) {
			if err := r.awaitLocks(ctx, c); err != nil {
				return err
			}
			if err := r.pause(ctx); err != nil {
				return err
			}
			continue
		}
		why := error(nil)
		switch j.Result {
		case "timeout":
			why = fmt.Errorf("stopped after %s, the hard limit", time.Duration(c.LimitSeconds)*time.Second)
		case "oom-kill":
			why = errors.New("killed for lack of memory")
		case "signal", "core-dump":
			why = fmt.Errorf("ended by signal %d", j.Code)
		case "gone":
			why = errors.New("systemd lost sight of it: the host was restarted, or somebody removed the unit")
		}
		return &CommandError{Argv: c.Argv, Code: j.Code, Output: output, Why: why}
	}
}

func (r *run) follow(ctx context.Context, name string) (host.JobState, error) {
	var last host.JobState
	for misses := 0; ; {
		j, err := r.Changer.Job(ctx, name)
		switch {
		case ctx.Err() != nil:
			return last, fmt.Errorf("%w: unit %s.service goes on", errStopped, name)
		case err != nil:
			// systemd is being upgraded, perhaps by this very job.
			if misses++; misses > 60 {
				return last, err
			}
		case !j.Found:
			last.Result, last.Name = "gone", name
			return last, nil
		case !j.Running:
			return j, nil
		default:
			misses, last = 0, j
		}
		if err := r.pause(ctx); err != nil {
			return last, fmt.Errorf("%w: unit %s.service goes on", errStopped, name)
		}
	}
}

// output reads the job's last lines from the journal.
func (r *run) output(ctx context.Context, j host.JobState) []string {
	since := j.Started
	if since.IsZero() {
		since = time.Now().Add(-time.Minute)
	}
	var out host.Output
	for _, c := range host.JournalTail(j.Name+".service", since, outputLines) {
		var err error
		if out, err = r.View.Run(ctx, c); err != nil {
			r.Log.Warn("the last lines of a job could not be read", "job", j.Name, "err", err)
		}
	}
	return lastLines(out.Stdout, outputLines)
}

// Resume looks for jobs that an agent left that was killed, follows them to
// their end and notes what came of them. It is called before the first plan.
func (a *Applier) Resume(ctx context.Context) error {
	jobs, err := a.Changer.Jobs(ctx)
	if errors.Is(err, host.ErrNoSystemd) {
		return nil
	}
	if err != nil {
		return err
	}
	records, err := readRecords(ctx, a.View)
	if err != nil {
		a.Log.Warn("not all of what was done before could be read", "err", err)
	}
	for _, j := range jobs {
		r := &run{Applier: a, step: Step{ID: strings.TrimPrefix(j.Name, host.JobPrefix)}}
		a.Log.Info("following a job that was begun before", "job", j.Name, "running", j.Running)
		end, err := r.follow(ctx, j.Name)
		if err != nil {
			return err
		}
		output := r.output(ctx, end)
		if err := a.Changer.CollectJob(ctx, j.Name); err != nil {
			return err
		}
		a.settle(ctx, records, end, output)
	}
	return nil
}

// managerOf is the package manager a job runs; "" when its command is not known.
func managerOf(argv []string) Manager {
	if len(argv) == 0 {
		return ""
	}
	return Manager(path.Base(argv[0]))
}

// settle notes the end of a job in the record of the step that began it.
func (a *Applier) settle(ctx context.Context, records []Record, j host.JobState, output []string) {
	id := strings.TrimPrefix(j.Name, host.JobPrefix)
	for _, rec := range slices.Backward(records) {
		i := slices.IndexFunc(rec.Results, func(r Result) bool { return r.Step == id && r.Outcome == Started })
		if i < 0 {
			continue
		}
		res := &rec.Results[i]
		res.Ended, res.Outcome = time.Now().UTC(), Applied
		if j.Result == "success" && j.Code == 0 {
			if res.Kind == finding.KindPackages && id == "packages" {
				res.Changes = append(res.Changes, Change{What: "packages", Name: strings.Join(res.Subjects, " "), Packages: res.Subjects, Hint: managerOf(j.Argv).removeHint(res.Subjects)})
			}
		} else {
			res.Outcome, res.Output = Failed, output
			res.Message = (&CommandError{Argv: j.Argv, Code: j.Code, Output: output}).Error()
		}
		a.audit(ctx, *res)
		st := &store{Changer: a.Changer, record: rec}
		if err := st.save(ctx); err != nil {
			a.Log.Warn("what a job came to could not be noted", "job", j.Name, "err", err)
		}
		return
	}
}

// Confirm holds what was applied against the reports of a check made since: the
// findings a step was to cure must be gone. What has not helped is failed, and
// its files are put back. A probe that could not look says nothing.
func (a *Applier) Confirm(ctx context.Context, reports []finding.Report) ([]Result, error) {
	records, err := readRecords(ctx, a.View)
	if err != nil {
		return nil, err
	}
	var judged []Result
	for _, rec := range records {
		st := &store{Changer: a.Changer, record: rec}
		changed := false
		for i := range rec.Results {
			res := &st.record.Results[i]
			if res.Outcome != Applied || !rec.RolledBack.IsZero() || !looked(res, reports) {
				continue
			}
			changed = true
			r := &run{Applier: a, store: st, index: i}
			if why, still := stillThere(res.Why, reports); still {
				res.Outcome = Failed
				res.Message = fmt.Sprintf("it was done and has not helped: %s: %s", why.Reason, why.Message)
				if len(res.Changes) > 0 && slices.ContainsFunc(res.Changes, func(c Change) bool { return c.What == "file" }) {
					left := r.undo(ctx, res.Changes)
					res.Outcome = RolledBack
					if len(left) > 0 {
						res.Message += "; not taken back: " + strings.Join(left, "; ")
					}
				}
			} else {
				res.Outcome = Confirmed
			}
			a.audit(ctx, *res)
			judged = append(judged, *res)
		}
		if changed {
			if err := st.save(ctx); err != nil {
				return judged, err
			}
		}
	}
	return judged, nil
}

// looked tells whether every probe a result waits for has been able to look
// since the step ended.
func looked(res *Result, reports []finding.Report) bool {
	for _, w := range res.Why {
		i := slices.IndexFunc(reports, func(r finding.Report) bool { return r.Probe == w.Probe })
		if i < 0 || reports[i].Status == finding.Unknown || reports[i].Started.Before(res.Ended) {
			return false
		}
	}
	return true
}

// Cured tells whether nothing that the record's steps were to cure is found any
// more.
func (r Record) Cured(reports []finding.Report) bool {
	return !slices.ContainsFunc(r.Results, func(res Result) bool {
		_, still := stillThere(res.Why, reports)
		return res.Outcome == Applied && still
	})
}
