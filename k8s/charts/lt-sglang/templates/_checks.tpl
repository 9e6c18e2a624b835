{{- /* What the schema cannot say. Fails the render with one sentence that names the value. */ -}}
{{- define "lt.checks" -}}
{{- include "lt.checkModel" . -}}
{{- include "lt.checkGpus" . -}}
{{- include "lt.checkMemory" . -}}
{{- include "lt.checkNodes" . -}}
{{- include "lt.checkTokens" . -}}
{{- include "lt.checkArgs" . -}}
{{- include "lt.checkKeys" . -}}
{{- include "lt.checkVolume" . -}}
{{- include "lt.checkExtensions" . -}}
{{- include "lt.checkRoutes" . -}}
{{- end }}

{{- define "lt.checkModel" -}}
{{- $m := .Values.model -}}
{{- if not (or $m.name $m.path $m.url) }}{{ fail "model.name: required (or model.path, for a folder of the volume, or model.url)" }}{{ end -}}
{{- if and $m.path $m.url }}{{ fail "model.url: model.path is another place; set one of them" }}{{ end -}}
{{- if and $m.path (not .Values.modelCache.existingClaim) }}{{ fail "model.path: needs modelCache.existingClaim, the volume that holds it" }}{{ end -}}
{{- end }}

{{- define "lt.checkGpus" -}}
{{- $e := .Values.engine -}}
{{- $tp := int $e.tensorParallel -}}{{- $node := int $e.gpu.perNode -}}{{- $nodes := int $e.nodesPerReplica -}}
{{- if hasKey $e.extraResources $e.gpu.resource }}{{ fail (printf "engine.extraResources: %s follows from engine.tensorParallel" $e.gpu.resource) }}{{ end -}}
{{- if eq $e.kind "Deployment" -}}
{{- if ne $nodes 1 }}{{ fail "engine.nodesPerReplica: a Deployment's engine is on one node; set engine.kind to LeaderWorkerSet" }}{{ end -}}
{{- if gt $tp $node }}{{ fail (printf "engine.tensorParallel: %d GPUs are more than a node's %d; set engine.kind to LeaderWorkerSet" $tp $node) }}{{ end -}}
{{- if ne (mod $node $tp) 0 }}{{ fail (printf "engine.tensorParallel: %d does not divide the %d GPUs of a node, so some would stay idle" $tp $node) }}{{ end -}}
{{- else -}}
{{- if lt $nodes 2 }}{{ fail "engine.nodesPerReplica: a LeaderWorkerSet needs at least 2; set engine.kind to Deployment" }}{{ end -}}
{{- if ne $tp (int (mul $nodes $node)) }}{{ fail (printf "engine.tensorParallel: %d, but %d nodes of %d GPUs have %d" $tp $nodes $node (mul $nodes $node)) }}{{ end -}}
{{- end -}}
{{- $heads := int .Values.model.attentionHeads -}}
{{- if and $heads (ne (mod $heads $tp) 0) }}{{ fail (printf "engine.tensorParallel: %d does not divide the model's %d attention heads" $tp $heads) }}{{ end -}}
{{- $kv := int .Values.model.kvHeads -}}
{{- if and $kv (ne (mod $kv $tp) 0) (ne (mod $tp $kv) 0) }}{{ fail (printf "engine.tensorParallel: %d and the model's %d KV heads do not divide one another" $tp $kv) }}{{ end -}}
{{- end }}

{{- define "lt.checkMemory" -}}
{{- $e := .Values.engine -}}
{{- $weights := divf .Values.model.weightsGiB $e.tensorParallel -}}
{{- $memory := include "lt.gpuMemory" . | float64 -}}
{{- if and .Values.model.weightsGiB (not $memory) }}{{ fail (printf "engine.gpu.memoryGiB: needed, as the memory of %s is not known here" (.Values.engine.gpu.product | default "a GPU without engine.gpu.product" | quote)) }}{{ end -}}
{{- $left := subf (mulf $memory $e.gpu.memoryFraction) $weights 0.75 -}}
{{- if and .Values.model.weightsGiB (lt $left 2.0) }}{{ fail (printf "engine.tensorParallel: %.1f GiB of weights on each GPU leave %.1f of %.1f GiB for KV; raise it" $weights $left $memory) }}{{ end -}}
{{- if lt (int $e.memoryGiB) (add $e.sharedMemoryGiB 16 | int) }}{{ fail (printf "engine.memoryGiB: %d holds the %d of engine.sharedMemoryGiB and at least 16 more" (int $e.memoryGiB) (int $e.sharedMemoryGiB)) }}{{ end -}}
{{- end }}

{{- define "lt.checkNodes" -}}
{{- $e := .Values.engine -}}
{{- $replicas := int (ternary .Values.autoscaling.maxReplicas $e.replicas .Values.autoscaling.enabled) -}}
{{- if .Values.autoscaling.enabled -}}
{{- if gt (int .Values.autoscaling.minReplicas) $replicas }}{{ fail "autoscaling.minReplicas: more than autoscaling.maxReplicas" }}{{ end -}}
{{- if not (or .Values.monitoring.podMonitor .Values.autoscaling.triggers) }}{{ fail "autoscaling.enabled: scales on what monitoring.podMonitor scrapes; switch that on, or give autoscaling.triggers of your own" }}{{ end -}}
{{- end -}}
{{- $needed := ternary (mul $replicas $e.nodesPerReplica) (div (add $replicas (div $e.gpu.perNode $e.tensorParallel) -1) (max 1 (div $e.gpu.perNode $e.tensorParallel))) (eq $e.kind "LeaderWorkerSet") | int -}}
{{- if and $e.clusterNodes (gt $needed (int $e.clusterNodes)) }}{{ fail (printf "engine.replicas: %d replicas of %d GPUs need %d nodes, engine.clusterNodes is %d" $replicas (int $e.tensorParallel) $needed (int $e.clusterNodes)) }}{{ end -}}
{{- end }}

{{- define "lt.checkTokens" -}}
{{- $t := .Values.lightTransfer -}}
{{- if and (eq $t.mode "static") (or $t.keep $t.score $t.decide $t.lastQueries $t.checkTables) }}{{ fail "lightTransfer.mode: keep, score, decide, lastQueries and checkTables are for dynamic" }}{{ end -}}
{{- end }}

{{- define "lt.checkArgs" -}}
{{- $set := list "--model-path" "--model" "--served-model-name" "--tp" "--tp-size" "--tensor-parallel-size" "--host" "--port" "--enable-metrics" "--mem-fraction-static" "--context-length" "--chunked-prefill-size" "--api-key" "--admin-api-key" "--attention-backend" "--nnodes" "--node-rank" "--dist-init-addr" -}}
{{- range .Values.engine.extraArgs -}}
{{- $flag := (split "=" .)._0 -}}
{{- if hasPrefix "--lt-" $flag }}{{ fail (printf "engine.extraArgs: %s has a value of its own in this chart" $flag) }}{{ end -}}
{{- range $set -}}
{{- /* SGLang takes abbreviations: --served is --served-model-name. */ -}}
{{- if or (eq $flag .) (and (hasPrefix "--" $flag) (gt (len $flag) 2) (hasPrefix $flag .)) }}{{ fail (printf "engine.extraArgs: %s is %s, which has a value of its own in this chart" $flag .) }}{{ end -}}
{{- end -}}
{{- if eq $flag "--use-ray" }}{{ fail "engine.extraArgs: --use-ray starts schedulers that load no plug-in" }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "lt.checkKeys" -}}
{{- $g := .Values.gateway -}}
{{- if and $g.enabled (ne $g.serviceType "ClusterIP") (not .Values.engine.apiKeySecret.name) (not $g.withoutKey) -}}
{{ fail (printf "gateway.serviceType: %s offers the model to whoever reaches it; set engine.apiKeySecret.name, or gateway.withoutKey=true if that is wanted" $g.serviceType) }}
{{- end -}}
{{- if and .Values.adminKeySecret.name (eq .Values.adminKeySecret.name .Values.engine.apiKeySecret.name) (eq .Values.adminKeySecret.key .Values.engine.apiKeySecret.key) -}}
{{ fail "adminKeySecret: the same key as engine.apiKeySecret, so every client would be an operator" }}
{{- end -}}
{{- end }}

{{- define "lt.checkVolume" -}}
{{- $replicas := int (ternary .Values.autoscaling.maxReplicas .Values.engine.replicas .Values.autoscaling.enabled) -}}
{{- $pods := mul $replicas (int .Values.engine.nodesPerReplica) -}}
{{- if and (not .Values.modelCache.existingClaim) (not .Values.model.url) (eq .Values.modelCache.accessMode "ReadWriteOnce") (gt $pods 1) -}}
{{ fail (printf "modelCache.accessMode: ReadWriteOnce is one node's, and %d pods read the volume; use ReadWriteMany or modelCache.existingClaim" $pods) }}
{{- end -}}
{{- end }}

{{- /* What a user adds must not replace what the chart relies on. */ -}}
{{- define "lt.checkExtensions" -}}
{{- /* Written out as it is, this key would merge the map below it into the one that it is in. */ -}}
{{- if contains "\"\\u003c\\u003c\":" (toJson .Values) }}{{ fail "<<: is no key of a value; write out what it is to merge" }}{{ end -}}
{{- $own := list "HOME" "HF_HUB_OFFLINE" "HF_MODULES_CACHE" "LT_API_KEY" "LT_ADMIN_KEY" "LT_SGLANG_ADMIN_API_KEY" "LT_CACHE" -}}
{{- range $where, $env := dict "engine.extraEnv" .Values.engine.extraEnv "gateway.extraEnv" .Values.gateway.extraEnv "modelCache.extraEnv" .Values.modelCache.extraEnv -}}
{{- $seen := ternary (list "MODEL" "REVISION" "TARGET" "HOME" "HF_TOKEN") $own (eq $where "modelCache.extraEnv") -}}
{{- range $env -}}
{{- if has .name $seen }}{{ fail (printf "%s: %s is set twice or by this chart" $where .name) }}{{ end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- end -}}
{{- range $where, $labels := dict "engine.podLabels" .Values.engine.podLabels "engine.labels" .Values.engine.labels "gateway.podLabels" .Values.gateway.podLabels "gateway.labels" .Values.gateway.labels -}}
{{- range $label, $_ := $labels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $label) (eq $label "helm.sh/chart") (hasPrefix "lt-sglang/" $label) }}{{ fail (printf "%s: %s is the chart's own label" $where $label) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $volumes := list "models" "scratch" "tmp" "shm" "kernels" "work" -}}
{{- range $where, $added := dict "engine.extraVolumes" .Values.engine.extraVolumes "modelCache.extraVolumes" .Values.modelCache.extraVolumes -}}
{{- range $added -}}
{{- if has .name $volumes }}{{ fail (printf "%s: %s is the chart's own volume" $where .name) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "lt.checkRoutes" -}}
{{- $r := .Values.httpRoute -}}
{{- if and $r.enabled (not .Values.gateway.enabled) }}{{ fail "httpRoute.enabled: leads to the gateway; set gateway.enabled, or inferencePool.parentRefs" }}{{ end -}}
{{- if and $r.enabled (not $r.parentRefs) }}{{ fail "httpRoute.parentRefs: missing; names the Gateway that the route belongs to" }}{{ end -}}
{{- if and $r.canary.weight (not $r.canary.release) }}{{ fail "httpRoute.canary.release: missing; names the release that gets httpRoute.canary.weight" }}{{ end -}}
{{- if and $r.enabled (not .Values.engine.apiKeySecret.name) (not .Values.gateway.withoutKey) }}{{ fail "httpRoute.enabled: offers the model to whoever reaches the Gateway; set engine.apiKeySecret.name, or gateway.withoutKey=true if that is wanted" }}{{ end -}}
{{- if and .Values.inferencePool.parentRefs (not .Values.engine.apiKeySecret.name) (not .Values.gateway.withoutKey) }}{{ fail "inferencePool.parentRefs: offers the model to whoever reaches the Gateway; set engine.apiKeySecret.name, or gateway.withoutKey=true if that is wanted" }}{{ end -}}
{{- if and .Values.engine.queue (hasKey .Values.engine.labels "kueue.x-k8s.io/queue-name") }}{{ fail "engine.labels: kueue.x-k8s.io/queue-name is what engine.queue sets" }}{{ end -}}
{{- if and .Values.job.command (eq .Values.engine.kind "LeaderWorkerSet") }}{{ fail "job.command: a Job has one node's GPUs; set engine.kind to Deployment" }}{{ end -}}
{{- if and .Values.job.command .Values.model.url }}{{ fail "job.command: reads a folder, and model.url is none; use modelCache" }}{{ end -}}
{{- range .Values.job.args -}}
{{- if or (hasPrefix "--model" .) }}{{ fail (printf "job.args: %s is what the chart sets" .) }}{{ end -}}
{{- end -}}
{{- end }}
