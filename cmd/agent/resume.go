package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
)

// remedies is the daemon's controller. Until mode enforce asks for it nothing
// that could write to the host exists.
func (d *daemon) remedies(view host.View, api *report.API, p *report.Publisher, log *slog.Logger, wake func(context.Context, string)) *remedy.Controller {
	return remedy.NewController(remedy.Options{
		Allowed: d.allowRemedies,
		Plan:    remedy.PlanFor(view),
		Work: func(permit remedy.Permit, told func(remedy.Result)) (remedy.Worker, error) {
			changer, err := host.OpenForChange(host.Options{Observe: d.observe})
			if err != nil {
				return nil, err
			}
			return &remedy.Applier{View: view, Changer: changer, Log: log, Permit: permit, Told: told}, nil
		},
		Gate: remedy.NewGate(api, d.nodeName, log),
		Node: p.Node, Tell: p.Tell, Remark: p.Remark,
		Wake: wake, Log: log,
	})
}

func newResume() *cobra.Command {
	var kubeconfig string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "resume",
		Short: "Let remedies go on after failures have stopped them on all nodes",
		Long: `resume clears the failures of the fleet. When as many steps have failed as
remedies.failureBudget allows, every agent stops until a person has looked at
them and runs this, with a kubeconfig that may update Leases in the namespace
host-hygiene; the agents' own token may not. A step that failed is still not
tried again on its node before remedies.cooldown has passed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if kubeconfig == "" {
				kubeconfig = clientcmd.NewDefaultClientConfigLoadingRules().GetDefaultFilename()
			}
			c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return exitError{exitUsage, err}
			}
			c.UserAgent = userAgent()
			api, err := report.NewAPI("", c)
			if err != nil {
				return exitError{exitUsage, err}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			p := progress(cmd, "text")
			defer p.Done()
			p.Say("asking the API server")
			were, cleared, err := remedy.Resume(ctx, api)
			p.Done()
			switch {
			case apierrors.IsForbidden(err):
				return exitError{exitFinding, fmt.Errorf("%w (want a kubeconfig that may get, create and update leases in the namespace %s)", err, remedy.Namespace)}
			case errors.Is(err, context.DeadlineExceeded):
				return exitError{exitFinding, fmt.Errorf("the API server did not answer within %s: %w", timeout, err)}
			case err != nil:
				return exitError{exitFinding, err}
			case !cleared:
				fmt.Fprintln(cmd.OutOrStdout(), "no step has failed on any node: there is nothing to clear")
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "cleared %d failed steps; remedies go on\n", were.Count)
			for _, f := range were.Latest {
				fmt.Fprintln(cmd.OutOrStdout(), " ", f)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "a person's kubeconfig `file`; as kubectl finds it without")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to try")
	return cmd
}
