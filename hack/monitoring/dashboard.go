package main

import (
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statushistory"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

const (
	dashboardUID = "host-hygiene"
	runbooks     = "https://github.com/hosthygiene/agent/blob/main/docs/runbooks/"
	nodeLink     = "/d/" + dashboardUID + "?var-datasource=${datasource}&var-cluster=${cluster}&var-node="
)

func source() common.DataSourceRef {
	return common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("${datasource}")}
}

// over asks for a curve, now for the present value of each series.
func over(expr, legend string) *prometheus.DataqueryBuilder {
	return prometheus.NewDataqueryBuilder().Expr(expr).LegendFormat(legend).Range().Datasource(source())
}

func now(expr string) *prometheus.DataqueryBuilder {
	return prometheus.NewDataqueryBuilder().RefId("A").Expr(expr).Instant().Format(prometheus.PromQueryFormatTable).Datasource(source())
}

// statusOf makes one number of a probe's statuses, as statuses has them.
func statusOf(by, selector string) string {
	return fmt.Sprintf(`max by (%[1]s) (
  hosthygiene_probe_status{%[2]s, status="Problem"} * 3
  or hosthygiene_probe_status{%[2]s, status="Unknown"} * 2
  or hosthygiene_probe_status{%[2]s, status="OK"}
  or hosthygiene_probe_status{%[2]s, status="NotApplicable"} * 0
)`, by, selector)
}

func statuses() []dashboard.ValueMapping {
	to := func(text, color string, index int32) dashboard.ValueMappingResult {
		return dashboard.ValueMappingResult{Text: &text, Color: &color, Index: &index}
	}
	return []dashboard.ValueMapping{{ValueMap: &dashboard.ValueMap{Type: dashboard.MappingTypeValueToText, Options: map[string]dashboard.ValueMappingResult{
		"0": to("n/a", "text", 0), "1": to("OK", "green", 1), "2": to("Unknown", "purple", 2), "3": to("Problem", "red", 3),
	}}}}
}

func steps(at ...dashboard.Threshold) *dashboard.ThresholdsConfigBuilder {
	return dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).
		Steps(append([]dashboard.Threshold{{Color: "green"}}, at...))
}

func from(value float64, color string) dashboard.Threshold {
	return dashboard.Threshold{Value: &value, Color: color}
}

func count(title, description, expr string, thresholds *dashboard.ThresholdsConfigBuilder) *stat.PanelBuilder {
	p := stat.NewPanelBuilder().Title(title).Description(description).Datasource(source()).
		WithTarget(prometheus.NewDataqueryBuilder().RefId("A").Expr(expr).Instant().Datasource(source())).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
		Height(4).Span(4)
	if thresholds != nil {
		return p.Thresholds(thresholds).ColorMode(common.BigValueColorModeBackground)
	}
	return p.ColorMode(common.BigValueColorModeNone)
}

func curves(title, description, unit string, targets ...*prometheus.DataqueryBuilder) *timeseries.PanelBuilder {
	p := timeseries.NewPanelBuilder().Title(title).Description(description).Unit(unit).Datasource(source()).
		Legend(common.NewVizLegendOptionsBuilder().ShowLegend(true).DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom)).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending)).
		ShowPoints(common.VisibilityModeNever).FillOpacity(5).
		Height(8).Span(12)
	for i, t := range targets {
		p = p.WithTarget(t.RefId(string(rune('A' + i))))
	}
	return p
}

// rows is a table whose columns are labels.
func rows(title, description, expr string, hidden ...string) *table.PanelBuilder {
	exclude := map[string]any{"Time": true, "Value": true}
	for _, h := range hidden {
		exclude[h] = true
	}
	return table.NewPanelBuilder().Title(title).Description(description).Datasource(source()).
		WithTarget(now(expr)).
		WithTransformation(dashboard.DataTransformerConfig{Id: "organize", Options: map[string]any{"excludeByName": exclude}}).
		OverrideByName("node", link("This node", nodeLink+"${__value.raw}", false)).
		OverrideByName("reason", link("What it means and how to mend it", runbooks+"${__value.raw}.md", true)).
		Height(8).Span(12)
}

func link(title, url string, tab bool) []dashboard.DynamicConfigValue {
	return []dashboard.DynamicConfigValue{{Id: "links", Value: []map[string]any{{"title": title, "url": url, "targetBlank": tab}}}}
}

func dashboardJSON() ([]byte, error) {
	variable := func(name, label, query string) *dashboard.QueryVariableBuilder {
		return dashboard.NewQueryVariableBuilder(name).Label(label).Datasource(source()).
			Query(dashboard.StringOrMap{Map: map[string]any{"query": query, "refId": name}}).
			Refresh(dashboard.VariableRefreshOnTimeRangeChanged).Sort(dashboard.VariableSortAlphabeticalAsc)
	}
	const (
		fleet = `cluster=~"$cluster"`
		one   = `cluster=~"$cluster", node=~"$node"`
		worse = `severity=~"warning|critical"`
	)
	board, err := dashboard.NewDashboardBuilder("Host hygiene").
		Uid(dashboardUID).
		Description("What the host-hygiene agent finds on the nodes: all of them, and one of them.").
		Tags([]string{"kubernetes", "host-hygiene"}).
		Editable().Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Time("now-6h", "now").Refresh("1m").
		Link(dashboard.NewDashboardLinkBuilder("Runbooks").Type(dashboard.DashboardLinkTypeLink).Icon("doc").Url(runbooks + "README.md").TargetBlank(true)).
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Prometheus").Type("prometheus")).
		WithVariable(variable("cluster", "Cluster", `label_values(hosthygiene_build_info, cluster)`).IncludeAll(true).AllValue(".*").
			Current(dashboard.VariableOption{Text: dashboard.StringOrArrayOfString{String: cog.ToPtr("All")}, Value: dashboard.StringOrArrayOfString{String: cog.ToPtr("$__all")}})).
		WithVariable(variable("node", "Node", `label_values(hosthygiene_build_info{`+fleet+`}, node)`)).
		WithRow(dashboard.NewRowBuilder("Fleet")).
		WithPanel(count("Nodes", "With an agent that answers.", `count(count by (cluster, node) (hosthygiene_build_info{`+fleet+`}))`, nil)).
		WithPanel(count("Nodes with a problem", "A finding of severity warning or critical that is not muted.",
			`count(max by (cluster, node) (hosthygiene_problem{`+fleet+`, `+worse+`}) == 1) or vector(0)`, steps(from(1, "orange")))).
		WithPanel(count("Nodes in a critical state", "",
			`count(max by (cluster, node) (hosthygiene_problem{`+fleet+`, severity="critical"}) == 1) or vector(0)`, steps(from(1, "red")))).
		WithPanel(count("Unknown probes", "What could not be checked, counted by node and probe.",
			`count(max by (cluster, node, probe) (hosthygiene_probe_status{`+fleet+`, status="Unknown"}) == 1) or vector(0)`, steps(from(1, "purple")))).
		WithPanel(count("Silent agents", "Targets that do not answer; the conditions of their nodes may be old.",
			`count(max by (cluster, node) (up{job="host-hygiene-agent", `+fleet+`}) == 0) or vector(0)`, steps(from(1, "red")))).
		WithPanel(count("Refused configs", "Nodes whose agent goes on with the last good config.",
			`count(max by (cluster, node) (hosthygiene_config_last_reload_successful{`+fleet+`}) == 0) or vector(0)`, steps(from(1, "orange")))).
		WithPanel(table.NewPanelBuilder().Title("Nodes and probes").Description("Click a node to see it below.").Datasource(source()).
			WithTarget(now(statusOf("node, probe", fleet))).
			WithTransformation(dashboard.DataTransformerConfig{Id: "groupingToMatrix", Options: map[string]any{"columnField": "probe", "rowField": "node", "valueField": "Value"}}).
			Mappings(statuses()).
			CellOptions(common.TableCellOptions{TableColoredBackgroundCellOptions: &common.TableColoredBackgroundCellOptions{Type: "color-background"}}).
			OverrideByName(`node\probe`, append(link("This node", nodeLink+"${__value.raw}", false),
				dashboard.DynamicConfigValue{Id: "custom.cellOptions", Value: map[string]any{"type": "auto"}},
				dashboard.DynamicConfigValue{Id: "displayName", Value: "node"})).
			Height(10).Span(24)).
		WithPanel(rows("Findings now", "The reason leads to its runbook.", `max by (cluster, node, probe, reason, severity) (hosthygiene_problem{`+fleet+`}) == 1`)).
		WithPanel(curves("Nodes by reason", "Many nodes with one reason have one cause.", "short",
			over(`count by (reason) (max by (cluster, node, reason) (hosthygiene_problem{`+fleet+`, `+worse+`}) == 1)`, "{{reason}}")).Decimals(0).Min(0)).
		WithPanel(rows("Shared identities", "Nodes that have the same machine-id, product UUID, NVMe host NQN or iSCSI initiator name as another one.",
			`(
  max by (cluster, node, kind, hash) (hosthygiene_identity_info{`+fleet+`})
  and on (kind, hash) count by (kind, hash) (count by (cluster, node, kind, hash) (hosthygiene_identity_info)) > 1
) or label_replace(
  max by (cluster, node, hash) (hosthygiene_iscsi_initiator_info{`+fleet+`})
  and on (hash) count by (hash) (count by (cluster, node, hash) (hosthygiene_iscsi_initiator_info)) > 1
, "kind", "iscsi-initiator", "", "")`)).
		WithPanel(curves("OOM kills", "Of the whole fleet, by where memory ran out.", "short",
			over(`sum by (scope) (increase(hosthygiene_oom_kills_total{`+fleet+`}[$__rate_interval]))`, "{{scope}}")).
			DrawStyle(common.GraphDrawStyleBars).FillOpacity(60).Decimals(0).Min(0)).
		WithRow(dashboard.NewRowBuilder("Node $node")).
		WithPanel(statushistory.NewPanelBuilder().Title("Probes").Datasource(source()).
			WithTarget(over(statusOf("probe", one), "{{probe}}").RefId("A")).
			Mappings(statuses()).ShowValue(common.VisibilityModeNever).RowHeight(0.9).MaxDataPoints(100).
			Legend(common.NewVizLegendOptionsBuilder().ShowLegend(true).DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom)).
			Height(9).Span(12)).
		WithPanel(rows("Findings", "kubectl describe node tells the subject.", `max by (node, probe, reason, severity) (hosthygiene_problem{`+one+`}) == 1`, "node").Height(9)).
		WithPanel(curves("Clock", "How far the clock is off by its daemon's account, and how far it may be at worst.", "s",
			over(`hosthygiene_time_offset_seconds{`+one+`}`, "offset"),
			over(`hosthygiene_time_error_bound_seconds{`+one+`}`, "error bound"))).
		WithPanel(curves("Multipath paths", "Of each map, by state.", "short",
			over(`sum by (map, state) (hosthygiene_multipath_paths{`+one+`})`, "{{map}} {{state}}")).Decimals(0).Min(0)).
		WithPanel(curves("iSCSI sessions", "By state.", "short",
			over(`sum by (state) (hosthygiene_iscsi_sessions{`+one+`})`, "{{state}}")).Decimals(0).Min(0)).
		WithPanel(curves("PIDs in use", "As a share of the limit: of the node, of all pods together, of units.", "percentunit",
			over(`max by (scope) (hosthygiene_pids{`+one+`, kind="used"}) / max by (scope) (hosthygiene_pids{`+one+`, kind="limit"} > 0)`, "{{scope}}")).Min(0)).
		WithPanel(curves("PIDs", "Threads in use, and what is reserved for the host.", "short",
			over(`max by (scope, kind) (hosthygiene_pids{`+one+`, kind=~"used|reserved"})`, "{{scope}} {{kind}}")).Decimals(0).Min(0)).
		WithPanel(curves("OOM kills", "By where memory ran out.", "short",
			over(`sum by (scope) (increase(hosthygiene_oom_kills_total{`+one+`}[$__rate_interval]))`, "{{scope}}")).
			DrawStyle(common.GraphDrawStyleBars).FillOpacity(60).Decimals(0).Min(0)).
		WithPanel(rows("Required packages that are missing", "", `max by (package) (hosthygiene_package_installed{`+one+`}) == 0`)).
		WithPanel(curves("Age of what is told", "Since each probe last ran without an error, by the node's own clock.", "s",
			over(`time() - max by (probe) (hosthygiene_probe_last_success_timestamp_seconds{`+one+`})`, "{{probe}}"))).
		WithPanel(curves("What the agent takes", "Duration of each probe's last run.", "s",
			over(`max by (probe) (hosthygiene_probe_duration_seconds{`+one+`})`, "{{probe}}")).Min(0)).
		WithPanel(curves("Writes and repairs", "To the API server by outcome, and remedies by result.", "short",
			over(`sum by (resource, outcome) (increase(hosthygiene_api_writes_total{`+one+`}[$__rate_interval]))`, "{{resource}} {{outcome}}"),
			over(`sum by (action, result) (increase(hosthygiene_remedies_total{`+one+`}[$__rate_interval]))`, "{{action}} {{result}}")).Min(0)).
		Build()
	if err != nil {
		return nil, err
	}
	for i, p := range board.Panels {
		id := uint32(i + 1)
		if p.Panel != nil {
			p.Panel.Id = &id
		} else {
			p.RowPanel.Id = id
		}
	}
	return indented(board)
}
