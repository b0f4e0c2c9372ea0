package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/pkg/terminal"
)

func newNodes(c *common) *cobra.Command {
	var output, selector string
	var watch bool
	cmd := &cobra.Command{
		Use:   "kubectl-hygiene",
		Short: "Show what the host-hygiene agents tell of the nodes, the worst first",
		Long: `kubectl hygiene shows every node with what the probes of its agent have told,
the worst first: a row a node, a column a probe. A cell is "ok", the reason of
the problem, "unknown" where the probe could not run, "-" where it does not
apply; a "?" behind it says that no agent vouches for it any more. Under the
table stand machine-ids and product UUIDs that several nodes have, and
ReadWriteOnce volumes stuck on nodes that are silent, with the safe way out.

It reads Nodes and the agent's pods, and changes nothing.

Exit codes: 0 nothing is wrong; 1 a problem; 2 the command line or the
kubeconfig is wrong, or nobody answers; 3 no problem known, but something could
not be seen.`,
		Example: `  kubectl hygiene -l pool=storage -o wide
  kubectl hygiene --watch
  kubectl hygiene explain n-time time
  kubectl hygiene upgrade-check --to 1.37`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if watch && (output == "json" || output == "yaml") {
				return exitError{exitUsage, errors.New("--watch shows a table: -o table or wide")}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			p := c.progress(cmd, client, output, "asking the API server")
			defer p.Done()
			report, _, volumesErr, err := c.report(cmd.Context(), client, selector)
			p.Done()
			if err != nil {
				return exitError{exitUsage, err}
			}
			if volumesErr != nil {
				report.NotChecked = append(report.NotChecked, "volumes on silent nodes: "+volumesErr.Error())
			}
			if watch {
				return c.watch(cmd.Context(), client, selector, output)
			}
			return c.show(report, output)
		},
	}
	outputFlag(cmd, &output)
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "show only nodes with these `labels`")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever it changes, until interrupted")
	return cmd
}

// report reads the nodes and the agent's pods, and, if nodes are silent, the
// volumes that may be stuck on them. Without the nodes there is no report; without
// the pods or the volumes there is.
func (c *common) report(ctx context.Context, client *cluster.Client, selector string) (r fleet.Report, nodes []corev1.Node, volumes, err error) {
	nodes, err = client.Nodes(ctx, selector)
	if err != nil {
		return fleet.Report{}, nil, nil, err
	}
	pods, podsErr := client.AgentPods(ctx, c.namespace, "")
	now := time.Now()
	r = fleet.NewReport(nodes, pods, now)
	if podsErr != nil {
		r.NotChecked = append(r.NotChecked, podsErr.Error())
	}
	r.StuckVolumes, volumes = stuck(ctx, client, nodes, now)
	return r, nodes, volumes, nil
}

func stuck(ctx context.Context, client *cluster.Client, nodes []corev1.Node, now time.Time) ([]fleet.StuckVolume, error) {
	silent := fleet.SilentNodes(nodes, now)
	if len(silent) == 0 {
		return nil, nil
	}
	attachments, volumes, err := client.Volumes(ctx)
	if err != nil {
		return nil, err
	}
	users, err := client.VolumeUsers(ctx, silent)
	if err != nil {
		return nil, err
	}
	return fleet.StuckVolumes(nodes, attachments, volumes, users, now), nil
}

// watch redraws the table on a terminal, and elsewhere writes it again when it
// says something else.
func (c *common) watch(ctx context.Context, client *cluster.Client, selector, output string) error {
	last := ""
	return client.Watch(ctx, selector, c.namespace, func(v cluster.View) {
		now := time.Now()
		r := fleet.NewReport(v.Nodes, v.Pods, now)
		if v.Err != nil && !apierrors.IsResourceExpired(v.Err) {
			r.NotChecked = append(r.NotChecked, v.Err.Error())
		}
		var b strings.Builder
		if err := r.WriteTable(&b, fleet.Style{Look: c.look, Wide: output == "wide"}); err != nil {
			return
		}
		switch {
		case b.String() == last:
		case terminal.Is(c.out):
			_ = terminal.Redraw(c.out, now.Format(time.TimeOnly)+"\n"+b.String()) // with the terminal this program ends
		default:
			fmt.Fprintf(c.out, "%s\n%s\n", now.UTC().Format(time.RFC3339), b.String())
		}
		last = b.String()
	})
}
