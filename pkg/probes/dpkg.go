package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/hosthygiene/agent/pkg/host"
)

// dpkg's database is a directory of text files (dpkg(1), FILES). It is read as
// such: no command, no lock, and true while dpkg itself is stuck.
const (
	dpkgStatus  = "/var/lib/dpkg/status"
	dpkgUpdates = "/var/lib/dpkg/updates"
	// dpkgStatusDir is how images without dpkg record their packages.
	dpkgStatusDir = "/var/lib/dpkg/status.d"
	// apt and dpkg hold the first for a whole run, dpkg the second while it
	// changes the database.
	dpkgFrontendLock = "/var/lib/dpkg/lock-frontend"
	dpkgLock         = "/var/lib/dpkg/lock"

	// maxStatusDirFiles and maxUpdates bound what a hostile directory costs.
	// dpkg folds its journal into status after 250 entries (lib/dpkg/dbmodify.c).
	maxStatusDirFiles = 4096
	maxUpdates        = 4096
	maxUpdateSize     = 1 << 20
)

// dpkgPackage is one stanza of the status file.
type dpkgPackage struct {
	name, arch, version string
	// want, flag and state are the words of Status: "install ok installed".
	want, flag, state string
	// provides are the virtual packages it stands in for, without versions.
	provides []string
}

// installed: the package's files are there and configured. triggers-awaited and
// triggers-pending come after configuration; "deinstall ok installed" is one
// that is merely selected for removal.
func (p dpkgPackage) installed() bool {
	switch p.state {
	case "installed", "triggers-awaited", "triggers-pending":
		return p.flag != "reinstreq"
	}
	return false
}

// unsettled: dpkg has begun something with the package and not finished.
func (p dpkgPackage) unsettled() bool {
	switch p.state {
	case "unpacked", "half-installed", "half-configured", "triggers-awaited", "triggers-pending":
		return true
	}
	return p.flag == "reinstreq"
}

// isNamed reports whether the package is the named one or provides it.
func (p dpkgPackage) isNamed(names map[string]bool) bool {
	if names[p.name] {
		return true
	}
	for _, v := range p.provides {
		if names[v] {
			return true
		}
	}
	return false
}

// dpkgDatabase is the part of the database that matters: packages somebody asks
// about and packages that are not settled.
type dpkgDatabase struct {
	packages []dpkgPackage
	// updates are the entries of dpkg's journal that status does not hold yet.
	// apt refuses to work while there are any and nobody holds the lock.
	updates []string
	// stanzas is how many packages status lists in all.
	stanzas int
}

// find returns the package of that name, or the one that provides it, in the
// best state if there are several architectures.
func (db dpkgDatabase) find(name string) (dpkgPackage, bool) {
	names := map[string]bool{name: true}
	var best dpkgPackage
	found := false
	for _, p := range db.packages {
		if !p.isNamed(names) || p.name != name && !p.installed() {
			continue
		}
		if !found || p.installed() && !best.installed() {
			best, found = p, true
		}
	}
	return best, found
}

func (db dpkgDatabase) unsettled() []dpkgPackage {
	var out []dpkgPackage
	for _, p := range db.packages {
		if p.unsettled() {
			out = append(out, p)
		}
	}
	return out
}

// dpkgCache keeps what was read from an unchanged status file: 5 MB of text a
// minute would be most of what the agent does.
type dpkgCache struct {
	status, dir fileID
	names       string
	db          dpkgDatabase
}

// readDpkg reads the database as far as it concerns the named packages.
func readDpkg(ctx context.Context, in Input, names []string) (dpkgDatabase, error) {
	// The journal first: dpkg empties it after it has written status, so what
	// is no longer in the one is in the other.
	updates, journal, err := readDpkgUpdates(ctx, in.Host)
	if err != nil {
		return dpkgDatabase{}, err
	}
	status, err := statID(ctx, in.Host, dpkgStatus)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return dpkgDatabase{}, err
	}
	dir, err := statID(ctx, in.Host, dpkgStatusDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return dpkgDatabase{}, err
	}

	wanted := nameSet(names)
	key := strings.Join(names, " ")
	cached, ok := Kept[dpkgCache](in.Memory, "dpkg")
	if !ok || cached.status != status || cached.dir != dir || cached.names != key {
		cached = dpkgCache{status: status, dir: dir, names: key}
		var err error
		if status != (fileID{}) {
			err = readDpkgFile(ctx, in.Host, dpkgStatus, false, wanted, &cached.db)
		}
		if err == nil && dir != (fileID{}) {
			err = readDpkgStatusDir(ctx, in.Host, wanted, &cached.db)
		}
		if err != nil {
			return dpkgDatabase{}, err
		}
		in.Memory.Keep("dpkg", cached)
	}
	db := cached.db
	db.updates = updates
	if len(journal) > 0 {
		db.packages = replayDpkgUpdates(db.packages, journal)
	}
	return db, nil
}

func readDpkgFile(ctx context.Context, h host.View, name string, statusDir bool, wanted map[string]bool, db *dpkgDatabase) error {
	data, err := h.ReadFile(ctx, name)
	if err != nil {
		return err
	}
	err = parseDpkgStatus(data, statusDir, func(s dpkgStanza) error {
		db.stanzas++
		p, keep, err := s.pkg(wanted, statusDir)
		if err == nil && keep {
			db.packages = append(db.packages, p)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func readDpkgStatusDir(ctx context.Context, h host.View, wanted map[string]bool, db *dpkgDatabase) error {
	files, err := h.ReadDir(ctx, dpkgStatusDir)
	if err != nil {
		return err
	}
	if len(files) > maxStatusDirFiles {
		return fmt.Errorf("%s: %d files, more than the %d a package database may have", dpkgStatusDir, len(files), maxStatusDirFiles)
	}
	for _, f := range files {
		if strings.HasSuffix(f, ".md5sums") || strings.HasPrefix(f, ".") {
			continue
		}
		if err := readDpkgFile(ctx, h, dpkgStatusDir+"/"+f, true, wanted, db); err != nil {
			return err
		}
	}
	return nil
}

// readDpkgUpdates reads dpkg's journal: files named by digits, each one stanza
// that replaces the package's stanza in status, later ones last. tmp.i is where
// dpkg prepares the next.
func readDpkgUpdates(ctx context.Context, h host.View) (names []string, journal []dpkgPackage, err error) {
	files, err := h.ReadDir(ctx, dpkgUpdates)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		if strings.Trim(f, "0123456789") != "" {
			continue
		}
		if len(names) == maxUpdates {
			return nil, nil, fmt.Errorf("%s: more than %d entries: no journal of dpkg's", dpkgUpdates, maxUpdates)
		}
		data, err := h.ReadFileMax(ctx, dpkgUpdates+"/"+f, maxUpdateSize)
		if errors.Is(err, fs.ErrNotExist) { // folded into status meanwhile
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		names = append(names, f)
		err = parseDpkgStatus(data, false, func(s dpkgStanza) error {
			p, _, err := s.pkg(nil, false)
			journal = append(journal, p)
			return err
		})
		if err != nil {
			return nil, nil, fmt.Errorf("%s/%s: %w", dpkgUpdates, f, err)
		}
	}
	return names, journal, nil
}

// replayDpkgUpdates lets the journal's entries replace what status says, as
// dpkg does when it starts. It does not change packages.
func replayDpkgUpdates(packages, journal []dpkgPackage) []dpkgPackage {
	type id struct{ name, arch string }
	at := make(map[id]int, len(packages)+len(journal))
	out := make([]dpkgPackage, 0, len(packages)+len(journal))
	for _, list := range [][]dpkgPackage{packages, journal} {
		for _, p := range list {
			k := id{p.name, p.arch}
			if i, ok := at[k]; ok {
				out[i] = p
				continue
			}
			at[k] = len(out)
			out = append(out, p)
		}
	}
	return out
}

// dpkgStanza is one stanza as it stands, not yet copied.
type dpkgStanza struct {
	line                                  int
	name, arch, version, status, provides []byte
	hasName, hasStatus, hasField          bool
}

// parseDpkgStatus calls visit for every stanza of a status file (deb822(5)):
// "Field: value" lines, continuation lines that begin with blank space, stanzas
// apart by empty lines. What dpkg itself would refuse is an error, with the
// line: a database that lost half its lines must not look like one with half
// its packages. loose permits a last line without a newline, which files in
// status.d may have.
func parseDpkgStatus(data []byte, loose bool, visit func(dpkgStanza) error) error {
	if i := bytes.IndexByte(data, 0); i >= 0 {
		return fmt.Errorf("line %d: a NUL byte: the file is damaged", 1+bytes.Count(data[:i], []byte("\n")))
	}
	if len(data) > 0 && data[len(data)-1] != '\n' && !loose {
		return errors.New("ends in the middle of a line: the file is truncated")
	}
	var s dpkgStanza
	line := 0
	flush := func() error {
		if !s.hasField {
			return nil
		}
		if !s.hasName {
			return fmt.Errorf("line %d: a stanza without Package", s.line)
		}
		done := s
		s = dpkgStanza{}
		return visit(done)
	}
	for len(data) > 0 {
		row, rest, _ := bytes.Cut(data, []byte("\n"))
		data = rest
		line++
		if len(bytes.TrimSpace(row)) == 0 {
			if err := flush(); err != nil {
				return err
			}
			continue
		}
		if row[0] == ' ' || row[0] == '\t' {
			if !s.hasField {
				return fmt.Errorf("line %d: a continuation of nothing", line)
			}
			continue
		}
		name, value, ok := bytes.Cut(row, []byte(":"))
		if !ok || len(name) == 0 {
			return fmt.Errorf("line %d: no field name and colon", line)
		}
		if !s.hasField {
			s.hasField, s.line = true, line
		}
		s.set(name, bytes.TrimSpace(value))
	}
	return flush()
}

// set keeps the few fields that matter; names are equal in any case (deb822(5)).
func (s *dpkgStanza) set(name, value []byte) {
	switch len(name) {
	case len("Package"): // and Version
		if bytes.EqualFold(name, []byte("Package")) {
			s.name, s.hasName = value, len(value) > 0
		} else if bytes.EqualFold(name, []byte("Version")) {
			s.version = value
		}
	case len("Status"):
		if bytes.EqualFold(name, []byte("Status")) {
			s.status, s.hasStatus = value, true
		}
	case len("Provides"):
		if bytes.EqualFold(name, []byte("Provides")) {
			s.provides = value
		}
	case len("Architecture"):
		if bytes.EqualFold(name, []byte("Architecture")) {
			s.arch = value
		}
	}
}

// pkg copies the stanza if it is one of the wanted packages, provides one, or
// is not settled; with a nil set always. statusDir stanzas have no Status: what
// is listed there is installed.
func (s dpkgStanza) pkg(wanted map[string]bool, statusDir bool) (p dpkgPackage, keep bool, err error) {
	status := string(s.status) // compared below, seldom kept
	switch {
	case status == "install ok installed", !s.hasStatus && statusDir:
		p.want, p.flag, p.state = "install", "ok", "installed"
	case !s.hasStatus:
		p.want, p.flag, p.state = "unknown", "ok", "not-installed"
	default:
		words := strings.Fields(status)
		if len(words) != 3 || !validDpkgStatus(words[1], words[2]) {
			return p, false, fmt.Errorf("line %d: package %q has no valid Status: %q", s.line, truncate(s.name, 64), truncate(s.status, 64))
		}
		p.want, p.flag, p.state = words[0], words[1], words[2]
	}
	keep = wanted == nil || wanted[string(s.name)] || p.unsettled() || s.providesOne(wanted)
	if keep {
		p.name, p.arch, p.version = string(s.name), string(s.arch), string(s.version)
		for v := range s.virtual() {
			p.provides = append(p.provides, string(v))
		}
	}
	return p, keep, nil
}

func (s dpkgStanza) providesOne(wanted map[string]bool) bool {
	for v := range s.virtual() {
		if wanted[string(v)] {
			return true
		}
	}
	return false
}

// virtual yields the names in Provides, e.g. "time-daemon, libfoo (= 1.2), bar:any".
func (s dpkgStanza) virtual() func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for rest := s.provides; len(rest) > 0; {
			var item []byte
			item, rest, _ = bytes.Cut(rest, []byte(","))
			item = bytes.TrimSpace(item)
			if end := bytes.IndexAny(item, " \t(:"); end >= 0 {
				item = item[:end]
			}
			if len(item) > 0 && !yield(item) {
				return
			}
		}
	}
}

// validDpkgStatus knows the second and third word of Status (dpkg(1)); "hold"
// and "hold-reinstreq" are what dpkg wrote before 1.15.
func validDpkgStatus(flag, state string) bool {
	switch flag {
	case "ok", "reinstreq", "hold", "hold-reinstreq":
	default:
		return false
	}
	switch state {
	case "not-installed", "config-files", "half-installed", "unpacked", "half-configured", "triggers-awaited", "triggers-pending", "installed":
		return true
	}
	return false
}

func nameSet(names []string) map[string]bool {
	m := make(map[string]bool, len(names))
	for _, n := range names {
		m[n] = true
	}
	return m
}

// truncate keeps hostile bytes in a message short.
func truncate(b []byte, n int) string {
	if len(b) > n {
		return string(b[:n]) + "…"
	}
	return string(b)
}
