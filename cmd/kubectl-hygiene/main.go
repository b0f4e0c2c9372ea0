// Command kubectl-hygiene is a kubectl plugin: what the agents tell of the nodes
// of a cluster, and whether the cluster is fit to be upgraded. This package holds
// the commands and the wiring, nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubeconfigs may name an auth-provider
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// version is set by the linker.
var version = "devel"

// Exit codes of the commands.
const (
	exitOK      = 0
	exitFinding = 1 // something is wrong
	exitUsage   = 2 // the command line or the kubeconfig is wrong, or nobody answers
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
	// What goes wrong with a watch is shown with the table.
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot(os.Stdout).ExecuteContext(ctx)
	stop()
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
		fmt.Fprintln(os.Stderr, "kubectl hygiene:", terminal.Line(msg))
	}
	return code
}

// common is what every command has.
type common struct {
	rules     *clientcmd.ClientConfigLoadingRules
	overrides clientcmd.ConfigOverrides
	namespace string
	out       io.Writer
	look      terminal.Look
}

func newRoot(out io.Writer) *cobra.Command {
	c := &common{rules: clientcmd.NewDefaultClientConfigLoadingRules(), out: out, look: terminal.LookOf(out)}
	cmd := newNodes(c)
	cmd.SetUsageTemplate(terminal.UsageTemplate(cmd.UsageTemplate(), c.look.Columns))
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	cmd.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl hygiene"}
	flags := cmd.PersistentFlags()
	flags.StringVar(&c.rules.ExplicitPath, "kubeconfig", "", "`file` with the cluster and the credentials; as kubectl finds it without")
	flags.StringVarP(&c.namespace, "namespace", "n", "host-hygiene", "the namespace that the agent runs in")
	names := clientcmd.RecommendedConfigOverrideFlags("")
	names.ContextOverrideFlags.Namespace.LongName = "" // ours has another default
	clientcmd.BindOverrideFlags(&c.overrides, flags, names)
	cmd.AddCommand(newExplain(c), newUpgradeCheck(c), newIdentities(c), newVersion(c))
	return cmd
}

func newVersion(c *common) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the plugin's version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(c.out, "kubectl-hygiene %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// client is made of kubectl's own flags and files.
func (c *common) client() (*cluster.Client, error) {
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(c.rules, &c.overrides).ClientConfig()
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	config.UserAgent = "kubectl-hygiene/" + version
	client, err := cluster.New(config)
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	return client, nil
}

// progress is for output that a person reads; what the client lists is told by it,
// after what that is for.
func (c *common) progress(cmd *cobra.Command, client *cluster.Client, output, what string) *terminal.Progress {
	if output == "json" || output == "yaml" {
		return nil
	}
	p := terminal.NewProgress(c.out, cmd.ErrOrStderr())
	told(p, client, what)
	return p
}

// told has progress tell what the client lists.
func told(p *terminal.Progress, client *cluster.Client, what string) {
	p.Say("%s", what)
	client.Listing = func(path string, come int) {
		text := what + ": listing " + path[strings.LastIndexByte(path, '/')+1:]
		if come > 0 {
			text += fmt.Sprintf(", %d so far", come)
		}
		p.Say("%s", text)
	}
}

// outputFlag adds -o to a command.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "table", "table, wide, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
}

var outputs = []string{"table", "wide", "json", "yaml"}

func checkOutput(output string) error {
	if !slices.Contains(outputs, output) {
		return exitError{exitUsage, fmt.Errorf("-o %s: want %s", output, strings.Join(outputs, ", "))}
	}
	return nil
}

// table is what a report is to a person.
type table interface {
	WriteTable(io.Writer, fleet.Style) error
	ExitCode() int
}

func (c *common) show(r table, output string) error {
	var err error
	switch output {
	case "json":
		// Go escapes what JSON demands, which is less than a terminal needs.
		if terminal.Is(c.out) {
			lines := terminal.NewLines(c.out)
			err = errors.Join(fleet.WriteJSON(lines, r), lines.Close())
			break
		}
		err = fleet.WriteJSON(c.out, r)
	case "yaml":
		err = fleet.WriteYAML(c.out, r)
	default:
		err = r.WriteTable(c.out, fleet.Style{Look: c.look, Wide: output == "wide"})
	}
	if err != nil {
		return exitError{exitUsage, err}
	}
	return exitError{r.ExitCode(), nil}
}

// quiet waits for what a person would not wait for without a word.
const quiet = 2 * time.Second
