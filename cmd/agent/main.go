// Command agent keeps a Linux node of a Kubernetes cluster fit to run storage
// and workloads: it verifies the host and says what is wrong where operators
// already look. This package holds the commands and the wiring, nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	_ "time/tzdata" // the image has no zoneinfo, and maintenance windows name zones

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// version is set by the linker.
var version = "devel"

// init pins the main goroutine to the main thread. A thread that has entered
// the host's namespaces must end with its goroutine, and the main thread can
// not end: it must never be the one that enters.
func init() { runtime.LockOSThread() }

// Exit codes of the commands.
const (
	exitOK      = 0
	exitFinding = 1 // a warning or critical finding, or the command failed
	exitUsage   = 2 // the command line or the config is wrong
	exitUnknown = 3 // no finding, but a probe could not run
)

// exitError carries an exit code; its message, if any, was not shown yet.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func main() {
	observe, err := observing(os.Getenv(observeVar))
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		err = newRoot(observe).ExecuteContext(ctx)
		stop()
	}
	os.Exit(exitCode(err))
}

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	var e exitError
	code := exitUsage
	if errors.As(err, &e) {
		code = e.code
	}
	if msg := err.Error(); msg != "" {
		fmt.Fprintln(os.Stderr, "agent:", report.Lines(msg))
	}
	return code
}

// common are the flags every command has.
type common struct {
	config string
	root   string
	// observe: nothing is done that changes the host, see observeVar.
	observe bool
}

// newRoot makes the commands; with observe those of repairs are refused.
func newRoot(observe bool) *cobra.Command {
	c := common{observe: observe}
	root := &cobra.Command{
		Use:   "agent",
		Short: "Checks that this Linux host is fit to run storage and workloads",
		Long: `agent checks a Linux host: time synchronisation, disks and mounts, multipath,
iSCSI, PID reservation, OOM scores, packages, units, kernel modules and
sysctls. On a cluster it runs as a DaemonSet and reports Node conditions,
Events and metrics; "agent check" looks at the host it is run on, with no
cluster at all, and "agent plan" says what could be repaired there.

Environment: NO_COLOR switches colours off where it is not empty; TERM does
that, too, where it is dumb, and what takes long is told once; NODE_NAME is the
Node's name, where the host's own is another.

Files: /var/lib/host-hygiene/ what was repaired and what had been there before,
the agent's only folder; /var/lib/host-hygiene/agent.sock where the agent that
runs answers explain.`,
		Example: `  agent check                  # what is wrong here, and how that is known
  agent explain oom            # one probe, and whom the kernel would kill first
  agent plan --config c.yaml   # what repairs would change`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&c.config, "config", "", "AgentConfig `file`; defaults without it")
	root.PersistentFlags().StringVar(&c.root, "root", "", "inspect the `directory` that holds a host's tree, its proc/ and sys/ included")
	root.SetUsageTemplate(terminal.UsageTemplate(root.UsageTemplate(), terminal.Width(os.Stdout)))
	_ = root.MarkPersistentFlagFilename("config", "yaml", "yml")
	_ = root.MarkPersistentFlagDirname("root")
	root.AddCommand(newRun(&c), newCheck(&c), newExplain(&c), newValidate(), newCleanup(), newVersion())
	repairs := []*cobra.Command{newPlan(&c), newApply(&c), newRollback(&c), newResume()}
	if observe {
		repairs = refused(repairs...)
	}
	root.AddCommand(repairs...)
	return root
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the agent's version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "agent %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
