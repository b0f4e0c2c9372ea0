package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/hosthygiene/agent/pkg/host"
)

// rpmDirs are where rpm keeps its database: /usr/lib/sysimage/rpm since rpm
// 4.16, /usr/share/rpm on ostree systems, /var/lib/rpm before and, as a symlink
// to one of them, still.
var rpmDirs = []string{"/usr/lib/sysimage/rpm", "/usr/share/rpm", "/var/lib/rpm"}

// rpmFiles are the databases of rpm's back ends: sqlite with its write-ahead
// log, ndb, Berkeley DB. -shm and .rpm.lock change with mere queries.
var rpmFiles = []string{"rpmdb.sqlite", "rpmdb.sqlite-wal", "Packages.db", "Packages"}

// rpmDatabase is where the database lies and which state of it was seen.
type rpmDatabase struct {
	dir string
	// state is equal as long as the files are; a committed transaction shows in
	// the write-ahead log before it reaches rpmdb.sqlite.
	state string
}

// findRPM looks for the database's files. The second result is false where the
// host has none.
func findRPM(ctx context.Context, h host.View) (rpmDatabase, bool, error) {
	for _, dir := range rpmDirs {
		var state strings.Builder
		for _, f := range rpmFiles {
			id, err := statID(ctx, h, dir+"/"+f)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return rpmDatabase{}, true, err
			}
			// A query leaves an empty log behind or takes it away.
			if strings.HasSuffix(f, "-wal") && id.size == 0 {
				continue
			}
			fmt.Fprintf(&state, "%s %+v\n", f, id)
		}
		if state.Len() > 0 {
			return rpmDatabase{dir, state.String()}, true, nil
		}
	}
	return rpmDatabase{}, false, nil
}

// rpmCache is rpm's answer about one state of its database: the one command a
// pass may cost runs only when a file has changed.
type rpmCache struct {
	state, names string
	installed    []string
	broken       string
}

// queryRPM returns which of the names are installed or provided. broken is rpm's
// own complaint when it can not open the database: it then calls every package
// "not installed", exit code and all.
func queryRPM(ctx context.Context, in Input, db rpmDatabase, names, virtual []string, busy bool) (installed []string, broken string, err error) {
	key := strings.Join(names, " ")
	cached, ok := Kept[rpmCache](in.Memory, "rpm")
	// During a transaction the database changes with every package; the answer
	// of before is as good until it ends.
	if ok && cached.names == key && (cached.state == db.state || busy) {
		return cached.installed, cached.broken, nil
	}
	cached = rpmCache{state: db.state, names: key}
	out, err := in.Host.Run(ctx, host.RPMQuery(names...))
	if err != nil {
		return nil, "", err
	}
	if cached.broken = rpmComplaint(out.Stderr); cached.broken == "" {
		var missing []string
		cached.installed, missing, err = parseRPMQuery(out.Stdout, names)
		if err != nil {
			return nil, "", err
		}
		for _, name := range missing {
			if !slices.Contains(virtual, name) {
				continue
			}
			out, err := in.Host.Run(ctx, host.RPMWhatProvides(name))
			if err != nil {
				return nil, "", err
			}
			if out.Code == 0 && bytes.IndexByte(out.Stdout, '\t') > 0 {
				cached.installed = append(cached.installed, name)
			}
		}
	}
	in.Memory.Keep("rpm", cached)
	return cached.installed, cached.broken, nil
}

// parseRPMQuery parses the lines of host.RPMQuery: NAME<TAB>EVR<TAB>ARCH for a
// package that is installed, "package NAME is not installed" for one that is
// not. A name without either is an error.
func parseRPMQuery(out []byte, names []string) (installed, missing []string, err error) {
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(line, "\n")
		if name, _, ok := strings.Cut(line, "\t"); ok {
			seen[name] = true
			continue
		}
		if name, ok := strings.CutPrefix(line, "package "); ok {
			if name, ok = strings.CutSuffix(name, " is not installed"); ok && !seen[name] {
				seen[name] = false
			}
		}
	}
	for _, name := range names {
		there, answered := seen[name]
		switch {
		case !answered:
			return nil, nil, fmt.Errorf("rpm said nothing about %q", name)
		case there:
			installed = append(installed, name)
		default:
			missing = append(missing, name)
		}
	}
	return installed, missing, nil
}

// rpmComplaint is the first "error:" line, e.g. "error: cannot open Packages
// database in /usr/lib/sysimage/rpm". Warnings are not meant.
func rpmComplaint(stderr []byte) string {
	for line := range bytes.Lines(stderr) {
		if rest, ok := bytes.CutPrefix(line, []byte("error: ")); ok {
			return truncate(bytes.TrimSpace(rest), 200)
		}
	}
	return ""
}
