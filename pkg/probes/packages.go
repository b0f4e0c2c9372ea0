package probes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Packages checks that what the host must have installed is there, and that its
// package manager could install something: its database is in order and nobody
// sits on its lock.
type Packages struct {
	Common
	// LockHeldFor is how long one process may hold the package manager's lock.
	// A release upgrade of a slow node takes minutes; unattended-upgrades that
	// hang hold it for days.
	LockHeldFor Duration `json:"lockHeldFor"`
}

// DefaultPackages returns the default settings.
func DefaultPackages() Packages { return Packages{LockHeldFor: Duration(15 * time.Minute)} }

// Name implements [Probe].
func (Packages) Name() string { return "packages" }

// Condition implements [Probe].
func (Packages) Condition() string { return ConditionPrefix + "PackageProblem" }

// Wakes implements [Probe]. What a query leaves beside the database must not
// count, or a query would be answered with the next one.
func (Packages) Wakes(Require) Wakes {
	w := Wakes{
		Files: append(followed(dpkgStatus, dpkgStatusDir+"/"),
			// A run of apt or dpkg, or what was left of one, is over.
			host.FollowedFile{Name: dpkgFrontendLock, On: host.FileReleased},
			host.FollowedFile{Name: dpkgLock, On: host.FileReleased}),
		// rpm lets go of its lock after its last write, and nobody tells.
		Again: 2 * time.Second,
	}
	for _, dir := range rpmDirs {
		for _, f := range rpmFiles {
			w.Files = append(w.Files, host.FollowedFile{Name: path.Join(dir, f), On: host.FileWritten})
		}
	}
	return w
}

// Validate implements [Probe].
func (p Packages) Validate() error { return positive("lockHeldFor", p.LockHeldFor) }

const (
	packageMissing       = "PackageMissing"
	packageManagerBroken = "PackageManagerBroken"
	packageLockHeld      = "PackageLockHeld"
)

// Rules implements [Probe].
func (Packages) Rules() []finding.Rule {
	return []finding.Rule{
		{
			Reason:   packageMissing,
			Severity: finding.Critical,
			Means:    "What require.packages names is not on this host. On image-based systems its programs and units were looked for instead.",
			Do:       "Install the package named in the evidence, or let remedies do it; where nothing is installed the message says how it comes there, and docs/distributions.md for each distribution.",
			HoldWhy:  "A package that is not there is not a matter of time; one that dpkg is just installing is not reported.",
		},
		{
			Reason:   packageManagerBroken,
			Severity: finding.Critical,
			Also:     []finding.Severity{finding.Warning},
			Means:    "dpkg was interrupted or left packages half installed, or rpm can not open its database; nobody is working on it. A warning when only triggers are left to run.",
			Do:       "dpkg: run 'dpkg --configure -a', then 'apt-get install -f'; a package that must be reinstalled needs 'apt-get install --reinstall' or 'dpkg --purge --force-remove-reinstreq'. rpm: run 'rpmdb --rebuilddb' after a copy of the database.",
			HoldWhy:  "It is judged only while the locks are free, before and after the database was read, so a normal run does not show.",
		},
		{
			Reason:   packageLockHeld,
			Severity: finding.Warning,
			Means:    "One process has held the package manager's lock for longer than lockHeldFor: meanwhile nothing can be installed, security updates included.",
			Do:       "Look at what the process waits for (a prompt, a hung maintainer script, a dead mount) and end it in an orderly way; never delete the lock file.",
			HoldWhy:  "lockHeldFor is the hold.",
		},
	}
}

// Check implements [Probe].
func (p Packages) Check(ctx context.Context, in Input) (finding.Result, error) {
	pass := packagesPass{Packages: p, Input: in}
	pass.run(ctx)
	return pass.result, errors.Join(pass.errs...)
}

// packagesPass is one pass over the host.
type packagesPass struct {
	Packages
	Input

	os      host.OS
	result  finding.Result
	errs    []error
	summary []string
}

func (c *packagesPass) fail(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

func (c *packagesPass) run(ctx context.Context) {
	var err error
	if c.os, err = c.Host.OS(ctx); err != nil {
		c.fail("which system this is: %w", err)
	}
	manager := c.findManager(ctx)
	needs := c.needs(familyOf(c.os, manager.name), manager)

	var dpkgNames, rpmNames, virtual []string
	for _, n := range needs {
		switch {
		case n.byProof:
		case manager.name == "dpkg":
			dpkgNames = append(dpkgNames, n.packages...)
		case manager.name == "rpm":
			rpmNames = append(rpmNames, n.packages...)
			if n.capability.name == "" {
				virtual = append(virtual, n.packages...)
			}
		}
	}
	ask := func(string) packageAnswer { return packageAnswer{} }
	if manager.dpkg {
		if answer := c.checkDpkg(ctx, dpkgNames); manager.name == "dpkg" {
			ask = answer
		}
	}
	if manager.hasRPM {
		if answer := c.checkRPM(ctx, manager.rpm, rpmNames, virtual); manager.name == "rpm" {
			ask = answer
		}
	}
	c.checkNeeds(ctx, needs, manager, ask)

	c.result.NotApplicable = len(c.Require.Packages) == 0 && !manager.dpkg && !manager.hasRPM
	if c.result.NotApplicable {
		c.summary = append(c.summary, "nothing is required, and there is no package database on this system")
	}
	c.result.Summary = strings.Join(c.summary, "; ")
}

// packageManager is what manages this host's packages.
type packageManager struct {
	// name is "dpkg" or "rpm": whose database answers what is installed. ""
	// where there is neither, or an image in which nothing is installed.
	name   string
	dpkg   bool
	hasRPM bool
	rpm    rpmDatabase
}

// findManager goes by the databases on the host, not by programs: rpm is an
// ordinary package on Debian, and dpkg one on Fedora.
func (c *packagesPass) findManager(ctx context.Context) packageManager {
	var m packageManager
	var err error
	for _, name := range []string{dpkgStatus, dpkgStatusDir} {
		switch _, err = c.Host.Stat(ctx, name); {
		case err == nil:
			m.dpkg = true
		case !errors.Is(err, fs.ErrNotExist):
			c.fail("dpkg's database: %w", err)
		}
	}
	// Where dpkg has the packages, rpm's database is one that somebody works with
	// by hand, and most hosts never have: twelve names to look for.
	const none = "no rpm database"
	since, looked := Kept[time.Time](c.Memory, none)
	if !m.dpkg || !looked || elapsed(c.Now, since, seldomFor) {
		if m.rpm, m.hasRPM, err = findRPM(ctx, c.Host); err != nil {
			c.fail("rpm's database: %w", err)
			m.hasRPM = false
		} else if !m.hasRPM {
			c.Memory.Keep(none, c.Now)
		}
	}
	debian := familyOf(c.os, "") == debianFamily
	switch {
	case m.dpkg && (debian || !m.hasRPM):
		m.name = "dpkg"
	case m.hasRPM:
		m.name = "rpm"
	}
	return m
}

// packageNeed is one entry of require.packages as it applies to this host.
type packageNeed struct {
	// name is the entry's, packages what would satisfy it, best first.
	name     string
	packages []string
	// capability is empty for a package nobody knows the purpose of.
	capability capability
	// byProof: programs and units are looked for, not packages.
	byProof bool
}

func (c *packagesPass) needs(f family, m packageManager) []packageNeed {
	// What an image brings need not be a package in it, and on ostree a package
	// list exists but is not what decides.
	image := c.os.Class == host.Image || c.os.Class == host.OSTree
	var needs []packageNeed
	seen := map[string]bool{}
	for _, req := range c.Require.Packages {
		if seen[req.Name] {
			continue
		}
		seen[req.Name] = true
		n := packageNeed{name: req.Name, packages: []string{req.Name}}
		var known bool
		if n.capability, known = capabilityNamed(req.Name); known {
			n.packages = n.capability.in(f)
		}
		for _, id := range osIDs(c.os) {
			if name, ok := req.Names[id]; ok {
				n.packages = []string{name}
				break
			}
		}
		n.byProof = m.name == ""
		if image {
			if !known {
				n.capability, known = capabilityOfPackage(n.packages[0])
			}
			n.byProof = n.byProof || known
		}
		needs = append(needs, n)
	}
	return needs
}

// packageAnswer is what a database says about one name.
type packageAnswer struct {
	// half: begun and not finished; inWork: the package manager is at it.
	installed, half, inWork bool
	// text is what stands there, source where.
	text, source string
	err          error
}

// checkNeeds judges every requirement.
func (c *packagesPass) checkNeeds(ctx context.Context, needs []packageNeed, m packageManager, ask func(string) packageAnswer) {
	var there, told []string
	for _, n := range needs {
		by, ok, err := c.satisfied(ctx, n, m, ask)
		if err != nil {
			// One broken database makes one error, not one per requirement.
			if !slices.Contains(told, err.Error()) {
				c.errs, told = append(c.errs, err), append(told, err.Error())
			}
			continue
		}
		value := 0.0
		if ok {
			value = 1
			there = append(there, by)
		}
		c.result.Sample("hosthygiene_package_installed", value, "package", n.name)
	}
	if len(there) > 0 {
		c.summary = slices.Insert(c.summary, 0, "present: "+strings.Join(there, ", "))
	}
}

// satisfied says by what a requirement is met; a finding says that it is not.
func (c *packagesPass) satisfied(ctx context.Context, n packageNeed, m packageManager, ask func(string) packageAnswer) (by string, ok bool, err error) {
	var evidence []finding.Evidence
	byProof, half := n.byProof, false
	for _, name := range n.packages {
		if byProof {
			break
		}
		a := ask(name)
		switch {
		case n.capability.name != "" && (errors.Is(a.err, host.ErrNotLive) || errors.Is(a.err, fs.ErrNotExist)):
			// rpm can not be asked: a tree, or an image that left rpm out.
			byProof = true
		case a.err != nil:
			return "", false, a.err
		case a.installed, a.inWork:
			return describe(n.name, a.text), true, nil
		default:
			half = half || a.half
			evidence = append(evidence, finding.Evidence{Source: a.source, Observed: a.text, Expected: name + " installed"})
		}
	}
	if n.capability.name == "" && byProof {
		return "", false, fmt.Errorf("whether %s is there: this host has no package database to ask (dpkg or rpm), and nothing is known by which to tell %s otherwise; require a capability (%s) or a unit instead",
			n.name, n.packages[0], strings.Join(Capabilities(), ", "))
	}
	if n.capability.name != "" {
		by, lacking, err := c.prove(ctx, n.capability)
		if err != nil {
			return "", false, fmt.Errorf("whether %s is there: %w", n.name, err)
		}
		// Programs that no asked package brought count too: timesyncd was part
		// of the package systemd until Debian 11. A package in a half state
		// does not become whole by them.
		if lacking == "" && !half {
			return describe(n.name, by), true, nil
		}
		if byProof {
			evidence = append(evidence, finding.Evidence{Source: "the programs and units of the system", Observed: lacking, Expected: n.capability.proof()})
		}
	}
	c.result.Add(c.missing(n, m, half, evidence))
	return "", false, nil
}

func describe(name, by string) string {
	if by == "" || by == name || strings.HasPrefix(by, name+" ") {
		return cmp.Or(by, name)
	}
	return name + " (" + by + ")"
}

func notInstalled(name string) string { return name + " is not installed" }

func (c *packagesPass) missing(n packageNeed, m packageManager, half bool, evidence []finding.Evidence) finding.Finding {
	f := finding.Finding{Reason: packageMissing, Severity: finding.Critical, Subject: n.name, Evidence: evidence}
	// Also where nothing is installed: the plan then says what to do instead.
	f.Remedy = &finding.Remedy{Action: finding.InstallPackage, Subject: n.packages[0]}
	consequence := "what needs it does not work on this node"
	if n.capability.name != "" {
		consequence = n.capability.without
	}
	canInstall := m.name != "" && (c.os.Class == host.Mutable || c.os.Class == host.Transactional || c.os.Class == "")
	switch {
	case !canInstall:
		how := cmp.Or(HowToBring(c.os, "it"), "how this system installs it is not known to the agent")
		f.Message = fmt.Sprintf("%s is required and not on this system (%s): %s; %s", n.name, c.os.ID, consequence, how)
	default:
		what := "the package " + n.name
		if n.packages[0] != n.name {
			what = fmt.Sprintf("%s (package %s)", n.name, n.packages[0])
		}
		state := "not installed"
		if half {
			state = "only half installed"
		}
		f.Message = fmt.Sprintf("%s is required and %s: %s", what, state, consequence)
	}
	return f
}

// programDirs are where hosts keep programs; Talos and Flatcar extensions use
// the local ones, systemd its own.
var programDirs = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin", "/opt/bin", "/usr/lib/systemd", "/lib/systemd"}

// unitDirs are systemd.unit(5)'s, highest precedence first.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// prove looks for the capability's programs and units on the host. lacking is
// empty when they are there.
func (c *packagesPass) prove(ctx context.Context, want capability) (by, lacking string, err error) {
	if by, ok := want.builtIn[c.os.ID]; ok {
		return by, "", nil
	}
	var have, lack []string
	for _, b := range want.binaries {
		found, err := c.findProgram(ctx, strings.Split(b, "|"))
		if err != nil {
			return "", "", err
		}
		if found == "" {
			lack = append(lack, "no "+strings.ReplaceAll(b, "|", ", "))
			continue
		}
		have = append(have, found)
	}
	if len(want.units) > 0 && c.os.Init == "systemd" {
		found, err := c.findUnit(ctx, want.units)
		if err != nil {
			return "", "", err
		}
		if found == "" {
			lack = append(lack, "no "+strings.Join(want.units, ", ")+" that is not masked")
		}
	}
	return strings.Join(have, ", "), strings.Join(lack, "; "), nil
}

// proof is what prove looks for, in words.
func (want capability) proof() string {
	s := strings.ReplaceAll(strings.Join(want.binaries, " and "), "|", " or ")
	if len(want.units) > 0 {
		s += ", and where systemd is " + strings.Join(want.units, " or ")
	}
	return s
}

func (c *packagesPass) findProgram(ctx context.Context, names []string) (string, error) {
	for _, name := range names {
		for _, dir := range programDirs {
			st, err := c.Host.Stat(ctx, path.Join(dir, name))
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			case err != nil:
				return "", err
			case st.Mode.IsRegular():
				return path.Join(dir, name), nil
			}
		}
	}
	return "", nil
}

func (c *packagesPass) findUnit(ctx context.Context, names []string) (string, error) {
	for _, name := range names {
		for _, dir := range unitDirs {
			file := path.Join(dir, name)
			st, err := c.Host.Lstat(ctx, file)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
				continue
			}
			if err != nil {
				return "", err
			}
			if st.Mode&fs.ModeSymlink != 0 {
				if target, err := c.Host.ReadLink(ctx, file); err != nil {
					return "", err
				} else if target == "/dev/null" { // masked: it hides those below
					break
				}
			}
			return file, nil
		}
	}
	return "", nil
}

// checkDpkg judges dpkg's database and lock and returns what answers about its
// packages.
func (c *packagesPass) checkDpkg(ctx context.Context, names []string) func(string) packageAnswer {
	// The locks are looked at before and, if something is half done, after the
	// database: a run that begins or ends in between shows in one of the two.
	locks := c.readLocks(ctx, dpkgFrontendLock, dpkgLock)
	db, err := readDpkg(ctx, c.Input, names)
	if err == nil && db.stanzas == 0 && familyOf(c.os, "") == debianFamily {
		err = fmt.Errorf("%s lists no package at all: the database is lost", dpkgStatus)
	}
	if err != nil {
		err = fmt.Errorf("dpkg's database: %w", err)
		if len(names) == 0 {
			c.errs = append(c.errs, err) // else it is told with what depends on it
		}
	}
	unfinished := len(db.updates) > 0 || len(db.unsettled()) > 0
	if unfinished && locks.unknown() == nil && !locks.held() {
		locks = c.readLocks(ctx, dpkgFrontendLock, dpkgLock)
	}
	switch {
	case err != nil:
	case !unfinished:
		c.summary = append(c.summary, "dpkg's database is in order")
	case locks.held():
		c.summary = append(c.summary, "dpkg is at work")
	case locks.unknown() != nil:
		c.fail("packages are half done (%s), and whether dpkg is at work on them can not be seen: %w", db.describeUnfinished(), locks.unknown())
	default:
		c.result.Add(dpkgBroken(db))
	}
	c.checkLocks(ctx, "dpkg", locks)

	return func(name string) packageAnswer {
		if err != nil {
			return packageAnswer{err: err}
		}
		p, ok := db.find(name)
		a := packageAnswer{source: dpkgStatus, text: notInstalled(name)}
		switch {
		case !ok, p.state == "not-installed", p.state == "config-files":
		case p.installed() && p.name != name:
			a.installed, a.text = true, name+" by "+p.name+" "+p.version
		case p.installed():
			a.installed, a.text = true, name+" "+p.version
		default:
			a.half, a.inWork, a.text = true, locks.held(), fmt.Sprintf("%s %s: %s %s %s", name, p.version, p.want, p.flag, p.state)
			if a.inWork {
				a.text += ", dpkg is at work on it"
			}
		}
		return a
	}
}

// maxEvidence bounds how many half-done packages one finding lists: a run that
// was killed in a release upgrade leaves hundreds.
const maxEvidence = 10

func dpkgBroken(db dpkgDatabase) finding.Finding {
	f := finding.Finding{Reason: packageManagerBroken, Severity: finding.Warning, Subject: "dpkg"}
	unsettled := db.unsettled()
	var reinstall, half bool
	for _, p := range unsettled {
		reinstall = reinstall || p.flag == "reinstreq"
		half = half || !p.installed()
	}
	if len(db.updates) > 0 || half {
		f.Severity = finding.Critical
	}
	if !reinstall {
		// What must be reinstalled survives 'dpkg --configure -a'.
		f.Remedy = &finding.Remedy{Action: finding.ConfigureDpkg, Subject: "dpkg"}
	}
	what := db.describeUnfinished()
	switch {
	case len(db.updates) > 0:
		f.Message = fmt.Sprintf("dpkg was interrupted (%s): apt refuses to install or upgrade anything until 'dpkg --configure -a' has been run", what)
	case reinstall:
		f.Message = fmt.Sprintf("dpkg was interrupted (%s): apt refuses to install or upgrade anything until the package is reinstalled or purged", what)
	case half:
		f.Message = fmt.Sprintf("dpkg left packages half done (%s): they may not work, and every run of apt tries them again and may fail", what)
	default:
		f.Message = fmt.Sprintf("dpkg has not run the triggers of packages it installed (%s): they wait for its next run", what)
	}
	if n := len(db.updates); n > 0 {
		f.Evidence = append(f.Evidence, finding.Evidence{
			Source:   dpkgUpdates,
			Observed: fmt.Sprintf("%d unfinished: %s", n, list(db.updates, maxEvidence)),
			Expected: "empty while nobody holds dpkg's locks",
		})
	}
	for i, p := range unsettled {
		if i == maxEvidence {
			break
		}
		f.Evidence = append(f.Evidence, finding.Evidence{
			Source:   dpkgStatus,
			Observed: fmt.Sprintf("%s %s: %s %s %s", p.name, p.version, p.want, p.flag, p.state),
			Expected: "install ok installed",
		})
	}
	f.Evidence = append(f.Evidence, finding.Evidence{Source: dpkgFrontendLock + ", " + dpkgLock, Observed: "free: nobody is working on it"})
	return f
}

// describeUnfinished names the packages that are half done.
func (db dpkgDatabase) describeUnfinished() string {
	var names []string
	for _, p := range db.unsettled() {
		state := p.state
		if p.flag == "reinstreq" {
			state = "must be reinstalled"
		}
		names = append(names, p.name+" "+state)
	}
	if len(names) == 0 {
		return "its journal is not empty"
	}
	return list(names, 5)
}

// list joins at most n strings and counts the rest.
func list(s []string, n int) string {
	if len(s) <= n {
		return strings.Join(s, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(s[:n], ", "), len(s)-n)
}

// checkRPM judges rpm's lock and, if something is required, its database, and
// returns what answers about its packages.
func (c *packagesPass) checkRPM(ctx context.Context, db rpmDatabase, names, virtual []string) func(string) packageAnswer {
	// Held only during a transaction; queries do not take it (rpm 4.18).
	locks := c.readLocks(ctx, path.Join(db.dir, ".rpm.lock"))
	c.checkLocks(ctx, "rpm", locks)
	switch {
	case locks.held():
		c.summary = append(c.summary, "rpm is at work")
	case locks.unknown() == nil:
		c.summary = append(c.summary, "rpm's lock is free")
	}
	if len(names) == 0 {
		return nil
	}
	installed, broken, err := queryRPM(ctx, c.Input, db, names, virtual, locks.held())
	switch {
	case err != nil:
		err = fmt.Errorf("rpm's database: %w", err)
	case broken != "":
		err = fmt.Errorf("what is installed: rpm can not open its database: %s", broken)
		c.result.Add(finding.Finding{
			Reason: packageManagerBroken, Severity: finding.Critical, Subject: "rpm",
			Message:  "rpm can not open its database: nothing can be installed or updated on this node, security updates included",
			Evidence: []finding.Evidence{{Source: "rpm -q, database in " + db.dir, Observed: broken, Expected: "an answer"}},
		})
	}
	return func(name string) packageAnswer {
		a := packageAnswer{err: err, source: "rpm -q, database in " + db.dir, text: notInstalled(name)}
		if slices.Contains(installed, name) {
			a.installed, a.text = true, name
		}
		return a
	}
}

// packageLock is the state of one lock file.
type packageLock struct {
	file string
	host.Lock
	// err: the state could not be seen.
	err error
}

type packageLocks []packageLock

func (l packageLocks) held() bool {
	return slices.ContainsFunc(l, func(k packageLock) bool { return k.Held })
}

func (l packageLocks) unknown() error {
	for _, k := range l {
		if k.err != nil {
			return k.err
		}
	}
	return nil
}

func (c *packagesPass) readLocks(ctx context.Context, files ...string) packageLocks {
	var locks packageLocks
	for _, f := range files {
		k := packageLock{file: f}
		k.Lock, k.err = c.readLock(ctx, f)
		locks = append(locks, k)
	}
	return locks
}

// readLock asks the kernel, and /proc/locks where that takes a privilege: the
// lock files are 0640, the table is everybody's.
func (c *packagesPass) readLock(ctx context.Context, file string) (host.Lock, error) {
	lock, err := c.Host.LockHolder(ctx, file)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist): // never taken yet
		return lock, nil
	case !errors.Is(err, fs.ErrPermission) && !errors.Is(err, host.ErrNotLive):
		return lock, err
	}
	st, statErr := c.Host.Stat(ctx, file)
	if errors.Is(statErr, fs.ErrNotExist) {
		return host.Lock{}, nil
	}
	table, readErr := c.Host.ReadFile(ctx, "/proc/locks")
	if statErr != nil || readErr != nil {
		return host.Lock{}, err
	}
	return parseProcLocks(table, st.Dev, st.Inode), nil
}

// parseProcLocks finds the write lock on a file in /proc/locks (proc_locks(5)):
//
//	1: POSIX  ADVISORY  WRITE 8751 fe:00:17335 0 EOF
//	1: -> POSIX ADVISORY  WRITE 8790 fe:00:17335 0 EOF
//
// FLOCK locks block neither apt nor dpkg; "->" is one that waits. The PID of an
// open-file-description lock is -1.
func parseProcLocks(table []byte, dev host.DevNum, inode uint64) host.Lock {
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) != 8 || f[1] != "POSIX" && f[1] != "OFDLCK" || f[3] != "WRITE" {
			continue
		}
		id := strings.Split(f[5], ":")
		if len(id) != 3 || id[2] != strconv.FormatUint(inode, 10) {
			continue
		}
		major, err1 := strconv.ParseUint(id[0], 16, 32)
		minor, err2 := strconv.ParseUint(id[1], 16, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		// Btrfs and overlayfs show one anonymous device (major 0) here and
		// another in stat(2).
		if (host.DevNum{Major: uint32(major), Minor: uint32(minor)}) != dev && (major != 0 || dev.Major != 0) {
			continue
		}
		pid, err := strconv.Atoi(f[4])
		if err != nil {
			continue
		}
		return host.Lock{Held: true, PID: pid}
	}
	return host.Lock{}
}

// checkLocks reports a process that sits on the package manager's lock.
func (c *packagesPass) checkLocks(ctx context.Context, manager string, locks packageLocks) {
	if err := locks.unknown(); err != nil && !errors.Is(err, host.ErrNotLive) {
		c.fail("who holds %s's lock: %w", manager, err)
		return
	}
	lastFree := manager + "'s lock was free"
	if !locks.held() {
		c.Memory.Best(lastFree, c.Now.Unix())
		return
	}
	var pids []int
	for _, k := range locks {
		if k.Held && k.PID > 0 {
			pids = append(pids, k.PID)
		}
	}
	var procs []host.Process
	if len(pids) > 0 {
		var err error
		if procs, err = c.Host.ProcessesNow(ctx, pids...); err != nil {
			c.fail("which process holds %s's lock: %w", manager, err)
		}
	}
	f := finding.Finding{Reason: packageLockHeld, Severity: finding.Warning, Subject: manager}
	var longest time.Duration
	for _, k := range locks {
		if !k.Held {
			continue
		}
		h := c.holderOf(k, procs, time.Unix(c.Memory.Best(lastFree, 0), 0))
		f.Evidence = append(f.Evidence, finding.Evidence{
			Source:   k.file,
			Observed: fmt.Sprintf("held by %s, %s", h.who, h.how),
			Expected: fmt.Sprintf("held for less than %s", c.LockHeldFor),
		})
		if d := c.Now.Sub(h.since); d > longest {
			longest = d
			f.Message = fmt.Sprintf("%s has held %s's lock for %s: nothing can be installed or updated meanwhile", h.who, manager, Duration(d.Truncate(coarse(d))))
		}
	}
	if longest >= c.LockHeldFor.D() {
		c.result.Add(f)
	}
}

// coarse is how exactly to say how long something has lasted.
func coarse(d time.Duration) time.Duration {
	if d < 2*time.Minute {
		return time.Second
	}
	return time.Minute
}

// lockHolder is who holds a lock, since when at least, and how that is known.
type lockHolder struct {
	who, how string
	since    time.Time
}

// holderOf. The kernel does not say when a lock was taken. A program that takes
// it as it starts tells by its age, so that a single pass sees it too; of others
// (PackageKit runs for weeks and locks for seconds) only what passes have seen
// counts.
func (c *packagesPass) holderOf(k packageLock, procs []host.Process, lastFree time.Time) lockHolder {
	i := slices.IndexFunc(procs, func(p host.Process) bool { return k.PID > 0 && p.PID == k.PID })
	if i < 0 {
		who := fmt.Sprintf("process %d, whose name can not be seen", k.PID)
		if k.PID <= 0 {
			// fcntl(2): -1 for open-file-description locks, 0 across PID namespaces.
			who = "a process the kernel does not name"
		}
		since := c.Memory.Since(fmt.Sprintf("lock %s %d", k.file, k.PID), c.Now)
		return lockHolder{who: who, how: "first seen " + since.UTC().Format(time.RFC3339), since: since}
	}
	p := procs[i]
	h := lockHolder{who: fmt.Sprintf("%s (PID %d)", printable(p.Comm), p.PID)}
	h.since = c.Memory.Since(fmt.Sprintf("lock %s %d %d", k.file, p.PID, p.StartTicks), c.Now)
	h.how = "first seen " + h.since.UTC().Format(time.RFC3339)
	if slices.Contains(lockAtStart, p.Comm) && !c.os.BootTime.IsZero() {
		started := c.os.BootTime.Add(time.Duration(p.StartTicks) * (time.Second / userHZ))
		if lastFree.After(started) {
			started = lastFree
		}
		if started.Before(h.since) {
			h.since, h.how = started, "which runs since "+started.UTC().Format(time.RFC3339)
		}
	}
	switch p.State {
	case 'D':
		h.how += ", stuck in the kernel (state D)"
	case 'Z':
		h.how += ", a zombie of which a thread lives on (state Z)"
	case 'T', 't':
		h.how += ", stopped (state T)"
	}
	return h
}

// lockAtStart are the programs, by their 15-byte comm, that take the lock within
// seconds of their start and run for one job.
var lockAtStart = []string{"apt", "apt-get", "dpkg", "unattended-upgr", "rpm"}

// userHZ is the unit of start times in /proc: 100 on every architecture the
// agent is built for, whatever the kernel's own HZ (proc_pid_stat(5)).
const userHZ = 100

// printable quotes a name that could play tricks on whoever reads it.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < '!' || r > '~' }) {
		return strconv.Quote(s)
	}
	return s
}

// fileID tells whether a file is still the one that was read.
type fileID struct {
	dev     host.DevNum
	inode   uint64
	size    int64
	modTime int64 // nanoseconds
}

func statID(ctx context.Context, h host.View, name string) (fileID, error) {
	st, err := h.Stat(ctx, name)
	if err != nil {
		return fileID{}, err
	}
	return fileID{st.Dev, st.Inode, st.Size, st.ModTime.UnixNano()}, nil
}
