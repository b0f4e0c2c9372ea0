package rig

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// timeSource is the NTP server of a node: a chronyd that serves this machine's
// clock to the loopback and, with -x, never touches it.
type timeSource struct {
	dir        string
	supervisor *supervisor
	port       int
	process    *process
}

func (t *timeSource) start() error {
	config := filepath.Join(t.dir, "time-source.conf")
	// cmdport 0 and the bindcmdaddress keep it from chronyc's usual places,
	// which belong to the daemon this machine may run for itself.
	text := fmt.Sprintf(`local stratum 8
allow 127.0.0.1
bindaddress 127.0.0.1
port %d
cmdport 0
bindcmdaddress /
pidfile %s
`, t.port, filepath.Join(t.dir, "time-source.pid"))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return fmt.Errorf("starting the time source: %w", err)
	}
	chronyd, err := lookPath("chronyd")
	if err != nil {
		return fmt.Errorf("starting the time source: %w", err)
	}
	// -u root: giving up root would clear the parent-death signal.
	t.process, err = t.supervisor.start(t.dir, "time-source", chronyd, "-x", "-d", "-u", "root", "-f", config)
	return err
}

func (t *timeSource) stop() error { return t.process.stop(5 * time.Second) }
